"""BTM of models with known probabilities, against numbers worked out by hand."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods import Models, Settings, TextSet, Variant, build_methods
from flexolmo_megatron.evaluation.methods.btm import mix_logits, mix_probabilities
from flexolmo_megatron.evaluation.methods.weights import causal_weights, whole_text_weights
from tests.evaluation.methods.fake_models import FakeModel, FakeStore, constant, contextual

AA = TextSet("letters", ("aa",))


def public_and_math() -> dict[str, FakeModel]:
    """P(a) is 1/2 and 1/4, P(b) the other way round, P(c) = P(end) = 1/8."""
    return {"public": FakeModel(constant(4, 2, 1, 1)), "math": FakeModel(constant(2, 4, 1, 1))}


def methods_of(store: FakeStore, **settings: object) -> dict[str, object]:
    public, *owners = store.paths
    models = Models(public, {path.name: path for path in owners})
    return {method.name: method for method in build_methods(models, Settings(**settings), ["btm"])}


def test_mixtures_by_hand(tmp_path: Path) -> None:
    store = FakeStore(tmp_path, public_and_math())
    methods = methods_of(store)
    assert list(methods) == ["BTM top-2 oracle", "BTM top-2 oracle probabilities", "BTM top-2 causal",
                             "BTM top-2 causal probabilities"]

    def probabilities(name: str) -> np.ndarray:
        values, = methods[name].log_probs(store, AA)
        return np.exp(values)

    # "aa" has probability 1/4 and 1/16: weights 4/5 and 1/5 for the whole text; 1/2 and 1/2, then 2/3 and 1/3 causally.
    np.testing.assert_allclose(probabilities("BTM top-2 oracle probabilities"), [9 / 20, 9 / 20], rtol=1e-6)
    np.testing.assert_allclose(probabilities("BTM top-2 causal probabilities"), [3 / 8, 5 / 12], rtol=1e-6)

    def of_logits(w: float) -> float:  # the weights of the letters are 4^w 2^(1-w), 2^w 4^(1-w), 1 and 1
        return 2 ** (1 + w) / (2 ** (1 + w) + 2 ** (2 - w) + 2)

    np.testing.assert_allclose(probabilities("BTM top-2 oracle"), [of_logits(4 / 5)] * 2, rtol=1e-6)
    np.testing.assert_allclose(probabilities("BTM top-2 causal"), [of_logits(1 / 2), of_logits(2 / 3)], rtol=1e-6)


def test_bits_per_byte(tmp_path: Path) -> None:
    store = FakeStore(tmp_path, public_and_math())
    score = methods_of(store)["BTM top-2 causal probabilities"].evaluate(store, AA)
    assert score.bits_per_byte == pytest.approx(-(math.log2(3 / 8) + math.log2(5 / 12)) / 2, rel=1e-6)
    assert (score.text_bytes, score.tokens, score.documents) == (2, 2, 1)


def test_only_a_text_own_models_compute_it_again(tmp_path: Path) -> None:
    store = FakeStore(tmp_path, public_and_math())
    texts = TextSet("letters", ("aaaa", "bbbb", "aa"))
    method = methods_of(store, btm_top_k=[1])["BTM top-1 oracle"]
    store.fill([method], [texts])
    for model in store.fakes.values():
        model.asked.clear()
    values = method.log_probs(store, texts)
    np.testing.assert_allclose(np.exp(np.concatenate(values)), [1 / 2] * 10, rtol=1e-6)
    public, math_model = store.fakes.values()
    assert [sorted(row[1].item() for row in asked) for asked in public.asked] == [[0, 0]]
    assert [sorted(row[1].item() for row in asked) for asked in math_model.asked] == [[1]]
    method.log_probs(store, texts)
    assert len(public.asked) == 1, "the second time it comes from a file"


def test_the_windows_of_a_long_text_get_the_weights_of_their_places(tmp_path: Path) -> None:
    """One window that holds all, and short ones: the same for models that look at the latest token alone."""
    def latest(factor: float) -> FakeModel:
        return lambda tokens: torch.sin(tokens[..., None] * factor + torch.arange(4) * 1.7)

    texts = TextSet("letters", ("abcabccbaabcabbbcaacb", "cab", "bbbbbbbbbbbb"))
    results = []
    for length in (64, 8):
        store = FakeStore(tmp_path / str(length), {name: FakeModel(latest(factor), length)
                                                   for name, factor in (("public", 0.7), ("math", 1.9))},
                          batch_tokens=20)
        results.append(mix_logits(store, texts, [Variant(path) for path in store.paths],
                                  partial(causal_weights, temperature=2, top_k=2)))
    for long, short in zip(*results, strict=True):
        np.testing.assert_allclose(long, short, rtol=1e-5)


def test_logits_of_contextual_models_against_a_direct_computation(tmp_path: Path) -> None:
    store = FakeStore(tmp_path, {name: FakeModel(contextual(factor))
                                 for name, factor in (("public", 0.3), ("math", 0.9), ("code", 1.3))})
    text, tokens = "abcabbca", torch.tensor([3, 0, 1, 2, 0, 1, 1, 2, 0])
    logits = torch.stack([model.compute(tokens[None, :-1])[0] for model in store.fakes.values()])
    target = tokens[1:]
    log_probs = logits.log_softmax(-1)[:, torch.arange(8), target]
    weights = torch.softmax(log_probs.sum(1) / 5, 0)
    expected = torch.einsum("n,nsv->sv", weights, logits).log_softmax(-1)[torch.arange(8), target]
    variants = [Variant(path) for path in store.paths]
    weigh = partial(whole_text_weights, temperature=5, top_k=3)
    values, = mix_logits(store, TextSet("letters", (text,)), variants, weigh)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    values, = mix_probabilities(store, TextSet("letters", (text,)), variants, weigh)
    np.testing.assert_allclose(values, (weights[:, None] * log_probs.exp()).sum(0).log(), rtol=1e-5)


def test_definitions_say_what_is_mixed_and_what_it_costs(tmp_path: Path) -> None:
    fakes = public_and_math() | {"code": FakeModel(constant(1, 1, 1, 1))}
    methods = methods_of(FakeStore(tmp_path, fakes), btm_top_k=[1, 9], btm_temperatures=[1, 20])
    assert len(methods) == 2 * 2 * 2 * 2  # 9 of 3 is all 3
    method = methods["BTM top-1 oracle tau=20"]
    assert method.definition == ("weighted mean of the logits of 1 of 3 dense models, the public one among them; "
                                 "weights softmax(-NLL / 20) from the whole text's likelihood")
    assert (method.sees, method.inference) == ("oracle", "3 forward passes for the weights, 1 of them again to predict")
    assert method.training_tokens({"public": 1000, "owner": 10}) == 1020
    assert method.training == "public + 2 owner"
    assert methods["BTM top-3 causal probabilities tau=1"].sees == "causal"


def test_models_with_other_tokens_are_refused(tmp_path: Path) -> None:
    fakes = public_and_math()
    fakes["math"].tokenizer.encode = lambda text: [0]
    store = FakeStore(tmp_path, fakes)
    with pytest.raises(FlexOlmoError, match="math cuts letters into other tokens than .*public: expected models with"):
        methods_of(store)["BTM top-2 causal"].log_probs(store, AA)


def test_no_dense_models_no_btm(tmp_path: Path) -> None:
    assert build_methods(Models(tmp_path), families=["btm"]) == []
