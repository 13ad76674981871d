"""Filling live models from canonical tensors and reading them back, on one process; for more see test_parallel.py."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.runtime.setup import initialize
from tests.random_models import SIZES, random_model, tensors_of


def build(lazy: LazyModel, **options) -> nn.Module:
    from flexolmo_megatron.model.builder import build_model
    from flexolmo_megatron.model.config import transformer_config

    initialize()
    return build_model(lazy.card.model, lazy.card.kind, transformer_config(lazy.card.model, lazy.card.kind, **options))


def assert_same(model: LazyModel, expected: LazyModel) -> None:
    ours, theirs = tensors_of(model), tensors_of(expected)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == model.tensors[name].dtype and ours[name].shape == model.tensors[name].shape


@pytest.fixture(params=["dense", "moe", "moe with bias", "anchor"])
def lazy(request) -> LazyModel:
    return {"dense": lambda: random_model("dense"), "moe": lambda: random_model("moe", 3, 2),
            "moe with bias": lambda: random_model("moe", 3, 2, bias=True),
            "anchor": lambda: random_model("moe", 1, 1)}[request.param]()


def test_round_trip(lazy):
    from flexolmo_megatron.model.weights import live_model, load_weights

    model = build(lazy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_weights(model, lazy)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    assert_same(live_model(model, lazy.card), lazy)
    assert model_digest(live_model(model, lazy.card)) == model_digest(lazy)


def test_loading_keeps_parameters_in_place(lazy):
    from flexolmo_megatron.model.weights import load_weights

    model = build(lazy)
    before = {name: (parameter.data_ptr(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    load_weights(model, lazy)
    assert {name: (parameter.data_ptr(), parameter.requires_grad)
            for name, parameter in model.named_parameters()} == before


def test_pair_takes_the_anchor_and_the_owner_apart():
    from flexolmo_megatron.model.weights import live_model, load_anchor, load_weights

    anchor, pair = random_model("moe", 1, 1), random_model("pair", 2, 2, seed=1, bias=True)
    model = build(pair)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_anchor(model, anchor)
    unfilled = {name for name, parameter in model.named_parameters() if parameter.isnan().any()}
    assert unfilled == {f"decoder.layers.{layer}.mlp.{part}" for layer in range(SIZES.num_layers) for part in (
        "expert.linear_fc1.weight", "expert.linear_fc2.weight", "router.row", "router.bias")}
    load_weights(model, pair)
    assert_same(live_model(model, anchor.card), anchor)
    assert_same(live_model(model, pair.card), pair)


@pytest.mark.parametrize("width", [SIZES.ffn_hidden_size, 20])
def test_expert_starts_as_the_anchor(width):
    from flexolmo_megatron.model.weights import init_expert_from_anchor, live_model, load_anchor

    anchor = random_model("moe", 1, 1)
    pair = random_model("pair", 2, 2, seed=1, sizes=replace(SIZES, ffn_hidden_size=width))
    model = build(pair, anchor_ffn_hidden_size=SIZES.ffn_hidden_size)
    load_anchor(model, anchor)
    rows = {name: parameter.clone() for name, parameter in model.named_parameters() if "router" in name}
    init_expert_from_anchor(model, anchor)
    expected = {name.replace("experts.0.", "experts.1."): value for name, value in tensors_of(anchor).items()}
    for name, value in tensors_of(live_model(model, pair.card)).items():
        if "experts" in name:
            start = expected[name][:, :width] if "down_proj" in name else expected[name][:width]
            assert torch.equal(value, start), name
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in rows.items())
    assert_same(live_model(model, anchor.card), anchor)


def test_an_expert_wider_than_the_anchor_cannot_start_as_its_copy():
    from flexolmo_megatron.model.weights import init_expert_from_anchor

    pair = random_model("pair", 2, 2, sizes=replace(SIZES, ffn_hidden_size=64))
    model = build(pair, anchor_ffn_hidden_size=SIZES.ffn_hidden_size)
    with pytest.raises(FlexOlmoError, match="model.ffn_hidden_size = 64 of the expert.*at most the anchor's, 48"):
        init_expert_from_anchor(model, random_model("moe", 1, 1))


def test_types_are_converted_except_the_bias():
    from flexolmo_megatron.model.weights import live_model, load_weights

    lazy = random_model("moe", 3, 2, bias=True)
    model = build(lazy, dtype=torch.bfloat16)
    load_weights(model, lazy)
    for name, value in tensors_of(live_model(model, lazy.card)).items():
        expected = lazy.tensors[name].read()
        if not name.endswith("bias"):
            expected = expected.bfloat16()
        assert value.dtype == expected.dtype and torch.equal(value, expected), name


def test_a_missing_tensor_is_named():
    from flexolmo_megatron.model.weights import load_weights

    lazy = random_model("moe", 3, 2)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    broken = LazyModel(lazy.card, {key: value for key, value in lazy.tensors.items() if key != name})
    with pytest.raises(FlexOlmoError, match=re.escape(f"moe model: tensor {name} is missing: expected shape [48, 32]")):
        load_weights(build(lazy), broken)


def test_an_extra_tensor_is_named():
    from flexolmo_megatron.model.weights import load_weights

    lazy = random_model("dense")
    extra = LazyModel(lazy.card, {**lazy.tensors, "model.rotary.inv_freq": lazy.tensors["model.norm.weight"]})
    with pytest.raises(FlexOlmoError, match="unexpected tensor model.rotary.inv_freq"):
        load_weights(build(lazy), extra)


@pytest.mark.parametrize(("live", "given", "message"), [
    (("moe", 3, 2), ("dense",), "in the given dense model fills the tensor decoder.layers.0.mlp.router.weight"),
    (("dense",), ("moe", 3, 2), "in the given moe model fills the tensor decoder.layers.0.mlp.linear_fc1.weight"),
    (("moe", 2, 2), ("pair", 2, 2), "in the given pair model fills the tensor embedding.word_embeddings.weight"),
    (("moe", 3, 2), ("moe", 4, 2), "has shape [3, 32] in the running model and [4, 32] in the given moe model"),
])
def test_a_model_that_does_not_fit_is_refused_before_anything_is_copied(live, given, message):
    from flexolmo_megatron.model.weights import live_model, load_weights

    target = random_model(*live)
    model = build(target)
    before = tensors_of(live_model(model, target.card))
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        load_weights(model, random_model(*given, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(live_model(model, target.card)).items())


def test_a_bias_without_a_place_is_refused():
    from flexolmo_megatron.model.weights import load_weights

    with pytest.raises(FlexOlmoError, match="no place for the tensor decoder.layers.0.mlp.router.bias"):
        load_weights(build(random_model("moe", 3, 2)), random_model("moe", 3, 2, bias=True))


@pytest.mark.parametrize("given", [("dense",), ("moe", 2, 1)])
def test_only_a_published_anchor_is_an_anchor(given):
    from flexolmo_megatron.model.weights import load_anchor

    with pytest.raises(FlexOlmoError, match="expected a published anchor, a moe model with one expert"):
        load_anchor(build(random_model("pair", 2, 2)), random_model(*given))
