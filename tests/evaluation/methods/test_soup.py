"""Averages of models, against averages of their tensors."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods import Models, Settings, Store, TextSet, Variant, build_methods
from flexolmo_megatron.evaluation.methods.soup import average, text_weights, write_soup
from tests.random_models import SIZES, lazy_model, random_model, tensors_of

TEXTS = TextSet("texts", ("some text", "x = 1"))


def test_the_mean_of_every_tensor() -> None:
    models = [random_model("dense", seed=seed) for seed in range(3)]
    expected = [tensors_of(model) for model in models]
    mean = average(models)
    assert mean.card == models[0].card
    for name, value in tensors_of(mean).items():
        stacked = torch.stack([tensors[name].double() for tensors in expected])
        assert torch.equal(value, (stacked.sum(dim=0) / 3).float()), name


def test_the_mean_of_equal_models_is_bitwise_the_model_in_its_own_type() -> None:
    model = random_model("dense")
    half = lazy_model(model.card, {name: value.bfloat16() for name, value in tensors_of(model).items()})
    for name, value in tensors_of(average([half] * 3)).items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, half.tensors[name].read())


def test_a_published_anchor_is_its_dense_model() -> None:
    anchor, dense = random_model("moe", 1, 1, seed=1), random_model("dense", seed=2)
    mean = tensors_of(average([anchor, dense]))
    assert set(mean) == set(dense.tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    values = anchor.tensors["model.layers.1.mlp.experts.0.up_proj.weight"].read(), dense.tensors[name].read()
    assert torch.equal(mean[name], (values[0] + values[1]) / 2)


def test_models_that_cannot_be_averaged() -> None:
    model = random_model("dense")
    with pytest.raises(FlexOlmoError, match="model 2 and the first one differ in their sizes .*: expected copies of"):
        average([model, random_model("dense", sizes=replace(SIZES, num_layers=1))])
    other = replace(model, card=replace(model.card, tokenizer={"type": "huggingface", "path": "x"}))
    with pytest.raises(FlexOlmoError, match="model 2 and the first one differ in their tokenizer"):
        average([model, other])
    with pytest.raises(FlexOlmoError, match="expected a dense model or a published anchor"):
        average([model, random_model("moe", 2, 2)])
    with pytest.raises(FlexOlmoError, match="no model to average"):
        average([])


def test_weights_of_a_text_by_hand() -> None:
    log_probs = np.log([[1 / 2, 1 / 2, 1 / 2], [1 / 4, 1 / 2, 1 / 8]])  # a mean of -ln 2 and of -2 ln 2
    np.testing.assert_allclose(text_weights(log_probs, 1), [2 / 3, 1 / 3])
    np.testing.assert_allclose(text_weights(log_probs, 0.5), [4 / 5, 1 / 5])


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """A published anchor and two owners' dense models, and their soup."""
    save_model(random_model("moe", 1, 1, seed=5), tmp_path / "public", "megatron")
    for seed, name in enumerate(("math", "code")):
        save_model(random_model("dense", seed=seed), tmp_path / name, "hf")
    paths = [tmp_path / name for name in ("public", "math", "code")]
    write_soup(paths, tmp_path / "soup")
    return Models(paths[0], {path.name: path for path in paths[1:]}, tmp_path / "soup")


def test_the_weighted_soup_between_the_best_model_and_the_mean(models: Models, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    paths = [models.public, *models.dense.values()]
    single = [store.log_probs(Variant(path), TEXTS) for path in paths]

    def soups(temperature: float) -> list[np.ndarray]:
        plain, weighted = build_methods(models, Settings(soup_temperature=temperature), ["soup"])
        assert (plain.name, plain.sees, weighted.name, weighted.sees) == ("soup", "causal", "soup weighted oracle",
                                                                         "oracle")
        assert weighted.training == plain.training == "public + 2 owner"
        assert weighted.inference == "4 forward passes, and 3 models' parameters read for each text"
        return [plain.log_probs(store, TEXTS), weighted.log_probs(store, TEXTS)]

    plain, weighted = soups(1e6)  # equal weights
    for one, two in zip(plain, weighted, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-4)
    _, weighted = soups(1e-6)  # all weight to the likeliest
    for number in range(2):
        best = max((values[number] for values in single), key=np.sum)
        np.testing.assert_allclose(weighted[number], best, rtol=1e-6)
    # Between the two, against a soup that is put together by hand.
    weights = text_weights(np.stack([values[0] for values in single]), 0.5)
    assert 0.01 < weights.max() < 0.99
    tensors = [tensors_of(average([open_model(path)])) for path in paths]
    made = {name: sum(weight * part[name].double() for weight, part in zip(weights, tensors, strict=True)).float()
            for name in tensors[0]}
    save_model(lazy_model(open_model(paths[1]).card, made), tmp_path / "made", "megatron")
    _, weighted = soups(0.5)
    np.testing.assert_allclose(weighted[0], store.log_probs(Variant(tmp_path / "made"), TEXTS)[0], atol=2e-4)


def test_the_soup_on_disk(models: Models) -> None:
    written = open_model(models.soup)
    assert written.card.kind == "dense"
    expected = average([open_model(path) for path in (models.public, *models.dense.values())])
    for name, value in tensors_of(written).items():
        assert torch.equal(value, expected.tensors[name].read()), name
    assert math.isfinite(value.sum())
