"""Log-probabilities that are computed once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flexolmo_megatron.config.card import RowSet
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import exclude_experts, open_model, save_model
from flexolmo_megatron.convert.rows import is_row
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods import Models, Store, TextSet, Variant, build_methods
from flexolmo_megatron.evaluation.perplexity import evaluate_documents, score_log_probs
from flexolmo_megatron.inference.model import load_model
from tests.evaluation.methods.fake_models import FakeModel, FakeStore, constant, contextual
from tests.random_models import lazy_model, random_model, tensors_of

LETTERS = TextSet("letters", ("abcab", "c", "aabbccaabbcc"))
TEXTS = TextSet("texts", ("a text of some length", "x = 1"))


def test_a_model_computes_a_set_of_texts_once(tmp_path: Path) -> None:
    first = FakeStore(tmp_path, {"public": FakeModel(contextual(0.7), length=8)})
    variant = Variant(first.paths[0])
    values = first.log_probs(variant, LETTERS)
    assert [len(part) for part in values] == [5, 1, 12]
    assert all(part.dtype == np.float32 for part in values)
    again = FakeStore(tmp_path, {"public": FakeModel(contextual(0.9), length=8)})  # another process
    (tmp_path / "public" / "weights").touch()  # is younger, so may have changed
    assert not np.allclose(again.log_probs(variant, LETTERS)[0], values[0])
    for one, two in zip(again.log_probs(variant, TextSet("other name", LETTERS.texts)),
                        again.log_probs(variant, LETTERS), strict=True):
        np.testing.assert_array_equal(one, two)
    assert again.loaded == ["public"]
    again.log_probs(variant, TextSet("letters", ("abc",)))
    assert len(list((tmp_path / "log_probs").glob("*.npz"))) == 3


def test_an_unchanged_model_is_not_even_loaded(tmp_path: Path) -> None:
    first = FakeStore(tmp_path, {"public": FakeModel(contextual(0.7), length=8)})
    first.fill(build_methods(Models(first.paths[0])), [LETTERS])
    later = Store(tmp_path / "log_probs", load=None)
    for one, two in zip(later.log_probs(Variant(first.paths[0]), LETTERS),
                        first.log_probs(Variant(first.paths[0]), LETTERS), strict=True):
        np.testing.assert_array_equal(one, two)


def test_windows_are_those_of_flexolmo_eval(tmp_path: Path) -> None:
    model = FakeModel(contextual(0.7), length=8)
    store = FakeStore(tmp_path, {"public": model}, batch_tokens=20)
    score = score_log_probs(LETTERS.texts, store.log_probs(Variant(store.paths[0]), LETTERS))
    expected = evaluate_documents(model, LETTERS.texts, batch_tokens=20)
    assert score.bits == pytest.approx(expected.bits, rel=1e-6)
    assert score.standard_error == pytest.approx(expected.standard_error, rel=1e-5)
    assert (score.tokens, score.text_bytes, score.documents) == (18, 18, 3)


def test_fill_loads_each_model_once_and_one_at_a_time(tmp_path: Path) -> None:
    store = FakeStore(tmp_path, {name: FakeModel(constant(1, 1, 1, 1)) for name in ("public", "math", "code")})
    public, *owners = store.paths
    methods = build_methods(Models(public, {path.name: path for path in owners}), families=["public", "dense", "btm"])
    sets = [LETTERS, TextSet("more", ("ab",))]
    store.fill(methods, sets)
    assert store.loaded == ["public", "math", "code"]
    assert list(store._models) == [owners[1]]
    for method in methods:
        for texts in sets:
            assert method.evaluate(store, texts).bits_per_byte == pytest.approx(2, abs=1e-6)
    assert store.loaded == ["public", "math", "code", "public", "math"], "BTM's logits need the other two again"


def test_a_missing_model_and_one_that_gives_nan(tmp_path: Path) -> None:
    store = FakeStore(tmp_path, {"public": FakeModel(lambda tokens: torch.full((*tokens.shape, 4), torch.nan))})
    with pytest.raises(FlexOlmoError, match="log-likelihood of document 3 is nan"):
        store.log_probs(Variant(store.paths[0]), LETTERS)
    assert not list((tmp_path / "log_probs").glob("*.npz"))
    with pytest.raises(FlexOlmoError, match="nowhere does not exist: expected a model"):
        store.log_probs(Variant(tmp_path / "nowhere"), LETTERS)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A merged model with two sets of router rows."""
    model, other = random_model("moe", 4, 2), random_model("moe", 4, 2, seed=1)
    sets = [RowSet("tuned", ["code", "math", "law"], ["code", "math", "law"]), RowSet("untuned")]
    model.card.row_sets = sets
    rows = {name: tensor for name, tensor in other.tensors.items() if is_row(name)}
    save_model(LazyModel(model.card, model.tensors, {"untuned": rows}), tmp_path / "tuned", "megatron")
    return tmp_path / "tuned"


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_another_number_of_active_experts(tuned: Path, tmp_path: Path, top_k: int) -> None:
    """As in a model that was written with this number."""
    store = Store(tmp_path / "store")
    values = store.log_probs(Variant(tuned, top_k=top_k), TEXTS)
    same = random_model("moe", 4, top_k)
    save_model(lazy_model(same.card, tensors_of(same)), tmp_path / "same", "megatron")
    for one, two in zip(values, store.log_probs(Variant(tmp_path / "same"), TEXTS), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    share = store.routing(Variant(tuned, top_k=top_k), TEXTS)
    assert share.experts == ["public", "code", "math", "law"]
    assert sum(share.weight[0]) == pytest.approx(1)
    after = load_model(tuned)
    assert after.config.top_k == 2


def test_what_a_variant_changes_is_changed_back(tuned: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    before = Store(tmp_path / "before").log_probs(Variant(tuned), TEXTS)
    store.log_probs(Variant(tuned, ("math",), 1, "untuned"), TEXTS)
    for one, two in zip(store.log_probs(Variant(tuned), TEXTS), before, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(("rows", "name"), [("strict", "untuned"), ("tuned", "tuned")])
def test_without_an_owner_and_with_either_rows(tuned: Path, tmp_path: Path, rows: str, name: str) -> None:
    store = Store(tmp_path / "store")
    model = open_model(tuned)
    rest = exclude_experts(model, ["math"], rows)
    assert (rest.card.row_sets[0].name if rest.card.row_sets else "untuned") == name
    save_model(rest, tmp_path / "rest", "megatron")
    for one, two in zip(store.log_probs(Variant(tuned, ("math",), rows=rows), TEXTS),
                        store.log_probs(Variant(tmp_path / "rest", rows="tuned"), TEXTS), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    share = store.routing(Variant(tuned, ("math",), rows=rows), TEXTS)
    assert [weights[2] for weights in share.weight] == [0, 0]


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    save_model(random_model("dense"), tmp_path / "dense", "hf")
    assert Store(tmp_path / "store").routing(Variant(tmp_path / "dense"), TEXTS) is None
