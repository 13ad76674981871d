"""Switching experts off: names to masks, and logits that are those of a model without the removed experts."""

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import save_model, select_experts
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.inference.access import allowed_experts, only_allowed
from flexolmo_megatron.inference.model import Model, load_model
from tests.random_models import NAMES, SIZES, lazy_model, random_model, tensors_of

EXACT = dict(rtol=0, atol=1e-6, equal_nan=False)
ROUNDING = dict(rtol=0, atol=5e-5, equal_nan=False)
SETS = [["public"], ["public", "math"], ["law", "public", "code"], ["public", "code", "math", "law"],
        ["public", "math"]]


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(SIZES.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def load(lazy: LazyModel, path) -> Model:
    save_model(lazy, path, "megatron")
    return load_model(path)


def without(lazy: LazyModel, names: Sequence[str], path) -> Model:
    """A model on disk from which all experts but ``names`` were removed."""
    return load(select_experts(lazy, names), path)


def with_nan(lazy: LazyModel, names: Sequence[str]) -> LazyModel:
    """The same model with NaN for everything that the named experts hold."""
    tensors = tensors_of(lazy)
    for number in map(lazy.card.expert_names.index, names):
        for name, value in tensors.items():
            if f".experts.{number}." in name:
                value.fill_(float("nan"))
            elif ".mlp.gate." in name:
                value[number] = float("nan")
    return lazy_model(lazy.card, tensors)


def test_names_to_masks():
    known = NAMES[:3]
    assert allowed_experts(None, known, 2) is None
    assert allowed_experts(["public", "math"], known, 2).tolist() == [[True, False, True]] * 2
    assert allowed_experts({"public", "math"}, known, 2).tolist() == [[True, False, True]] * 2
    for lists in ((["public"], ("math", "public")), [{"public"}, frozenset(("math", "public"))]):
        assert allowed_experts(lists, known, 2).tolist() == [[True, False, False], [True, False, True]]


def test_names_of_all_but_some(model, dense):
    assert model.experts_without("math", "code") == ["public", "law"]
    assert model.experts_without() == model.expert_names
    batch = tokens(2, 7)
    expected = model.logits(batch, {"public", "math", "code"})
    assert torch.equal(model.logits(batch, model.experts_without("law")), expected)
    with pytest.raises(FlexOlmoError, match=r"unknown expert 'mth' \(did you mean 'math'\?\): expected one of public,"):
        model.experts_without("mth")
    with pytest.raises(FlexOlmoError, match="expert 'public' cannot be excluded"):
        model.experts_without("public")
    with pytest.raises(FlexOlmoError, match="unknown expert 'math': this model has none"):
        dense.experts_without("math")


@pytest.mark.parametrize(("experts", "message"), [
    (["public", "cod"], "experts: unknown expert 'cod' (did you mean 'code'?): expected one of public, code, math"),
    ([["public"], ["public", "xyz"]], "experts[1]: unknown expert 'xyz': expected one of public, code, math"),
    (["code"], "experts = ['code'] leaves out 'public': the anchor cannot be excluded"),
    ([["public"], ["math"]], "experts[1] = ['math'] leaves out 'public'"),
    ([], "experts = [] leaves out 'public'"),
    ([[], ["public"]], "experts[0] = [] leaves out 'public'"),
    ([["public"]], "experts has 1 lists for 2 sequences: expected one per sequence"),
    ("public", "experts = 'public': expected a list of expert names"),
    ({"public": True}, "expected a list of expert names, or one list per sequence"),
    (["public", ["code"]], "expected a list of expert names"),
    ([1, 2], "expected a list of expert names"),
    ([["public"], [3]], "experts[1] = [3]: expected a list of expert names"),
])
def test_wrong_names_are_refused(experts, message):
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        allowed_experts(experts, NAMES[:3], 2)


def test_a_dense_model_has_no_experts_to_choose(dense):
    with pytest.raises(FlexOlmoError, match="this is a dense model, which has none to choose from"):
        dense.logits(tokens(1, 3), ["public"])


def test_masks_are_taken_off_again_also_after_an_error(model):
    before = model.logits(tokens(1, 5))
    with pytest.raises(ZeroDivisionError), only_allowed(model.module, torch.tensor([[True, False, False, False]])):
        raise ZeroDivisionError
    assert torch.equal(model.logits(tokens(1, 5)), before)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_mixed_batch_is_exactly_the_physically_removed_models(top_k, bias, tmp_path):
    merged = random_model("moe", 4, top_k, bias=bias)
    batch = tokens(len(SETS), 23)
    ours = load(merged, tmp_path / "merged")
    logits, at_once = ours.logits(batch, SETS), ours.logits(batch, SETS, exact=False)
    for row, names in enumerate(SETS):
        removed = without(merged, names, tmp_path / str(row))
        assert removed.config.top_k == min(top_k, len(names))
        expected = removed.logits(batch)[row]
        torch.testing.assert_close(logits[row], expected, **EXACT)
        torch.testing.assert_close(at_once[row], expected, **ROUNDING)
    assert (logits[0] - ours.logits(batch)[0]).abs().max() > 0.1, "exclusion changed nothing"


def test_removed_experts_may_hold_nan(merged, tmp_path):
    names = ["public", "math"]
    damaged = load(with_nan(merged, ["code", "law"]), tmp_path / "damaged")
    batch = tokens(3, 19)
    expected = without(merged, names, tmp_path / "removed").logits(batch)
    assert damaged.logits(batch).isnan().any()
    for exact, tolerance in ((True, EXACT), (False, ROUNDING)):
        torch.testing.assert_close(damaged.logits(batch, names, exact=exact), expected, **tolerance)


def test_an_expert_with_nan_reaches_no_sequence_that_excludes_it(merged, tmp_path):
    damaged = load(with_nan(merged, ["code"]), tmp_path / "damaged")
    batch = tokens(3, 19)
    sets = [["public", "law"], ["public", "code", "math", "law"], ["public", "law", "math"]]
    for exact, tolerance in ((True, EXACT), (False, ROUNDING)):
        logits = damaged.logits(batch, sets, exact=exact)
        assert logits[1].isnan().any(), "the sequence that uses the expert shows that it is damaged"
        for row in (0, 2):
            expected = without(merged, sets[row], tmp_path / f"{row}{exact}").logits(batch)[row]
            torch.testing.assert_close(logits[row], expected, **tolerance)


def test_the_anchor_alone_is_the_dense_anchor(merged, tmp_path):
    anchor = load(as_dense(select_experts(merged, ["public"])), tmp_path / "anchor")
    batch = tokens(2, 21)
    nan = load(with_nan(merged, ["code", "math", "law"]), tmp_path / "damaged")
    torch.testing.assert_close(nan.logits(batch, ["public"]), anchor.logits(batch), **ROUNDING)


def test_a_sequence_does_not_depend_on_its_batch(model):
    batch = tokens(4, 17)
    alone = torch.cat([model.logits(batch[row : row + 1]) for row in range(4)])
    assert torch.equal(model.logits(batch), alone)


def test_order_and_repetition_of_names_do_not_matter(model):
    batch = tokens(1, 9)
    assert torch.equal(model.logits(batch, ["public", "law", "math"]),
                       model.logits(batch, ["math", "public", "law", "math"]))
