"""The domain router by itself: its formula, its bias, its z-loss and its exclusions, against plain torch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.runtime.setup import initialize
from tests.random_models import SIZES

EXPERTS = 5


@pytest.fixture
def new_router():
    """Build a router of random rows: ``new_router(top_k, bias=..., **config)``, in evaluation mode."""
    initialize()
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.model.router import DomainRouter

    def build(top_k: int, bias: list[float] | None = None, experts: int = EXPERTS, **overrides):
        model = replace(SIZES, num_experts=experts, top_k=top_k, router_bias=bias is not None)
        router = DomainRouter(transformer_config(model, "moe", **overrides), get_default_pg_collection())
        router.set_layer_number(1)
        with torch.no_grad():
            rows = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0))
            router.weight.copy_(rows / SIZES.hidden_size**0.5)
            if bias is not None:
                router.bias.copy_(torch.tensor(bias))
        return router.eval()

    return build


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(7, 3, SIZES.hidden_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
@pytest.mark.parametrize("training", [False, True])
def test_softmax_before_top_k_without_renormalisation(new_router, hidden, top_k, training):
    router = new_router(top_k).train(training)
    probs, routing_map = router(hidden)
    assert probs.dtype == torch.float32
    full = (hidden.flatten(0, 1) @ router.weight.T).softmax(dim=-1)
    kept = torch.zeros_like(full).scatter(1, full.topk(top_k, dim=1).indices, 1)
    torch.testing.assert_close(probs, full * kept, rtol=0, atol=1e-6)
    assert torch.equal(routing_map, kept.bool())
    if top_k < EXPERTS:
        assert (probs.sum(dim=1) < 0.999).any(), "the kept probabilities must not be scaled to sum to one"


def test_logits_are_fp32_for_a_bf16_model(new_router, hidden):
    router = new_router(2, dtype=torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    expected = hidden.bfloat16().float() @ router.weight.float().T
    for training in (False, True):
        logits = router.train(training).gating(hidden.bfloat16())
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_bias_counts_only_below_zero(new_router, hidden):
    with_bias = new_router(2, bias=[0.0, -1.5, 0.8, -0.2, 3.0])
    assert with_bias.bias.dtype == torch.float32
    shift = with_bias.gating(hidden) - new_router(2).gating(hidden)
    expected = torch.tensor([0.0, -1.5, 0.0, -0.2, 0.0]).expand_as(shift)
    torch.testing.assert_close(shift, expected, rtol=0, atol=1e-5)


def test_bias_is_kept_in_fp32_in_a_bf16_model(new_router):
    assert new_router(2, bias=[0.0] * EXPERTS, dtype=torch.bfloat16).bias.dtype == torch.float32


@pytest.mark.parametrize(("bias", "gradient", "expected"), [
    (-0.5, 2.0, 2.0), (-0.5, -2.0, -2.0),  # below 0: as usual
    (0.0, 2.0, 2.0), (0.3, 2.0, 2.0),  # at or above 0: may come down
    (0.0, -2.0, 0.0), (0.3, -2.0, 0.0),  # and is not pushed up
])
def test_gradient_of_the_bias(new_router, hidden, bias, gradient, expected):
    router = new_router(2, bias=[bias] * EXPERTS)
    from flexolmo_megatron.model.router import hold_biases_at_zero

    # Two parts of one sum: what counts is their sum, however it is split.
    router.gating(hidden)[0, 0].backward(torch.full((EXPERTS,), gradient * 3))
    router.gating(hidden)[0, 0].backward(torch.full((EXPERTS,), gradient * -2))
    router.bias.main_grad = router.bias.grad
    hold_biases_at_zero(router)
    # The anchor's bias, the first, does not train.
    torch.testing.assert_close(router.bias.main_grad, torch.tensor([0.0] + [expected] * (EXPERTS - 1)))


def test_z_loss(new_router, hidden, monkeypatch):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)  # of a training run before
    coefficient = 0.01
    gradients = []
    for value in (None, coefficient):
        router = new_router(EXPERTS, moe_z_loss_coeff=value).train()
        (router(hidden)[0] * 0).sum().backward()  # only the z-loss, which Megatron adds in the backward pass, is left
        gradients.append(router.weight.grad)
    router = new_router(EXPERTS).train()
    logits = router.gating(hidden).flatten(0, 1)
    (logits.logsumexp(dim=-1).square().mean() * coefficient).backward()
    assert not gradients[0].any()
    torch.testing.assert_close(gradients[1], router.weight.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [1, 80], ids=["", "with probabilities of 0"])
@pytest.mark.parametrize("experts", [5, 16, 24, 70])
def test_exclusion_is_that_of_a_smaller_router_bitwise(new_router, experts, scale):
    hidden = torch.randn(60, 3, SIZES.hidden_size, generator=torch.Generator().manual_seed(1))
    router = new_router(2, bias=[-index / experts for index in range(experts)], experts=experts)
    kept = [0, *range(3, experts, 2)]
    removed = [index for index in range(experts) if index not in kept]
    smaller = new_router(2, bias=[0.0] * len(kept), experts=len(kept))
    with torch.no_grad():
        smaller.weight.copy_(router.weight[kept])
        smaller.bias.copy_(router.bias[kept])
        for rows in (router.weight, smaller.weight):
            rows *= scale
        router.weight[removed] = float("nan")
        router.bias[removed] = float("nan")
        router.allowed_BE = torch.ones(3, experts, dtype=torch.bool)
        router.allowed_BE[:, removed] = False
        probs, routing_map = router(hidden)
        expected, expected_map = smaller(hidden)
    assert torch.equal(probs[:, kept], expected) and torch.equal(routing_map[:, kept], expected_map)
    assert not probs[:, removed].any() and not routing_map[:, removed].any()


def test_another_router_of_upstreams_is_refused(new_router):
    with pytest.raises(FlexOlmoError, match="moe_expert_capacity_factor = 0.5: expected None, the paper's router"):
        new_router(2, moe_expert_capacity_factor=0.5)


def test_top_k_becomes_the_number_that_is_left(new_router, hidden):
    router = new_router(4)
    router.allowed_BE = torch.tensor([[True, False, False, False, True], [True] * 5, [True] + [False] * 4])
    _, routing_map = router(hidden)
    per_sequence = routing_map.view(7, 3, EXPERTS).sum(dim=-1)
    assert torch.equal(per_sequence, torch.tensor([2, 4, 1]).expand(7, 3))
