"""Random weights by name: Megatron's distribution, one and the same tensor whenever it is read."""

import math
from dataclasses import replace

import pytest
import torch

from flexolmo_megatron.config.card import ExpertRecord, ModelCard
from flexolmo_megatron.convert.initial import random_model
from flexolmo_megatron.convert.names import expected_tensors
from tests.random_models import NAMES, SIZES

MODEL = replace(SIZES, num_layers=3, num_experts=2, top_k=1, router_bias=True)
CARD = ModelCard("moe", MODEL, [ExpertRecord(name) for name in NAMES[:2]])


def test_every_tensor_has_its_shape_and_distribution():
    model = random_model(CARD, seed=1)
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == expected_tensors(MODEL, "moe")
    for name, tensor in model.tensors.items():
        values = tensor.read()
        assert values.dtype == torch.float32 and values.shape == tensor.shape
        if "norm" in name:
            assert values.eq(1).all(), name
        elif name.endswith(".bias"):
            assert values.eq(0).all(), name
        else:
            into_residual = "o_proj" in name or "down_proj" in name
            std = 0.02 / math.sqrt(2 * 3) if into_residual else 0.02
            # Of n normal numbers the standard deviation is off by 1 / sqrt(2 n); five times that is never reached.
            assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel())), name
            assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel()), name


def test_tensors_are_independent_of_each_other_and_of_the_order_of_reading():
    one, other = random_model(CARD, seed=1), random_model(CARD, seed=2)
    names = [name for name in one.tensors if "norm" not in name and not name.endswith(".bias")]
    first = {name: one.tensors[name].read() for name in names}
    torch.manual_seed(5)
    for name in reversed(names):
        assert one.tensors[name].read().equal(first[name])
        assert not other.tensors[name].read().equal(first[name])
    flat = torch.stack([first[name].flatten()[:64] / first[name].std() for name in names])
    products = (flat @ flat.T / 64).fill_diagonal_(0)
    assert products.abs().max() < 0.8, "two tensors were drawn from the same random numbers"


def test_reading_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    random_model(CARD, seed=1).tensors["lm_head.weight"].read()
    assert torch.get_rng_state().equal(state)
