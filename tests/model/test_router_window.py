"""Routing logits averaged over a window: against a loop, split over processes, and piece by piece as in an answer.

1e-6: sums in another order.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.random_models import SIZES

LOGITS_SBE = torch.randn(24, 2, 3, generator=torch.Generator().manual_seed(0))
WINDOWS = (1, 2, 5, 24, 1000)


def _loop(logits_sbE: Tensor, window: int, valid_sb: Tensor) -> Tensor:
    means = torch.zeros_like(logits_sbE)
    for sequence in range(logits_sbE.shape[1]):
        for place in range(len(logits_sbE)):
            members = [logits_sbE[other, sequence] for other in range(max(0, place - window + 1), place + 1)
                       if valid_sb[other, sequence]]
            if members:
                means[place, sequence] = torch.stack(members).mean(0)
    return means


@pytest.mark.parametrize("window", WINDOWS)
def test_mean_over_the_window(window):
    from flexolmo_megatron.model.router_window import window_mean

    padded = torch.ones(LOGITS_SBE.shape[:2], dtype=torch.bool)
    expected = _loop(LOGITS_SBE, window, padded)
    torch.testing.assert_close(window_mean(LOGITS_SBE, window), expected, rtol=0, atol=1e-6)
    padded[:4, 1] = False
    torch.testing.assert_close(window_mean(LOGITS_SBE, window, padded), _loop(LOGITS_SBE, window, padded), rtol=0,
                               atol=1e-6)


def test_experts_are_averaged_by_themselves():
    from flexolmo_megatron.model.router_window import window_mean

    damaged = LOGITS_SBE.clone()
    damaged[..., 1] = torch.nan
    rest = [0, 2]
    assert torch.equal(window_mean(damaged, 5)[..., rest], window_mean(LOGITS_SBE[..., rest], 5))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pieces", [[24], [10, 1, 1, 12], [1] * 24])
def test_pieces_of_an_answer_give_the_same(window, pieces):
    from flexolmo_megatron.model.router_window import LogitHistory, window_mean

    starts_b = torch.tensor([0, 6])
    history = LogitHistory(window, starts_b)
    means = torch.cat([history.mean(piece) for piece in LOGITS_SBE.split(pieces)])
    expected = window_mean(LOGITS_SBE, window, torch.arange(24)[:, None] >= starts_b)
    torch.testing.assert_close(means, expected, rtol=0, atol=1e-6)


def test_the_router_averages_before_it_chooses():
    from flexolmo_megatron.runtime.setup import initialize

    initialize()
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.model.router import DomainRouter
    from flexolmo_megatron.model.router_window import window_mean

    model = replace(SIZES, num_experts=3, top_k=2, router_window=5, router_bias=True)
    router = DomainRouter(transformer_config(model, "moe"), get_default_pg_collection()).eval()
    router.bias.data = torch.tensor([0.0, -1.0, -0.5])
    hidden = torch.randn(24, 2, SIZES.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = window_mean(hidden @ router.weight.T + router.bias, 5)
    torch.testing.assert_close(router.gating(hidden), expected, rtol=0, atol=1e-5)
    router.allowed_BE = torch.tensor([[True, True, False]])
    gated = router.gating(hidden)
    assert torch.equal(gated[..., 2], torch.full((24, 2), -torch.inf)), "a mean with -inf must not reach later tokens"
    torch.testing.assert_close(gated[..., :2], expected[..., :2], rtol=0, atol=1e-5)


def _own(whole_s: Tensor, ways: str, rank: int) -> Tensor:
    """This rank's part of the first dimension, of two: its chunks under context parallelism, its half of a sequence."""
    if ways == "context":
        parts = whole_s.chunk(4)
        return torch.cat([parts[rank], parts[3 - rank]])
    return whole_s.chunk(2)[rank]


def average_parts() -> dict[str, tuple[Tensor, Tensor]]:
    """What each of two processes does: means of its part, and gradients of a sum that weighs every position."""
    from flexolmo_megatron.runtime.setup import initialize, prepare

    prepare()
    from megatron.core import parallel_state

    from flexolmo_megatron.model.router_window import window_mean_of_part

    results = {}
    weights = torch.arange(1.0, 25.0)[:, None, None]
    for ways, layout in (("sequence", dict(tensor_parallel=2)), ("context", dict(context_parallel=2))):
        initialize(**layout)
        rank = torch.distributed.get_rank()
        cp_group = parallel_state.get_context_parallel_group()
        sp_group = parallel_state.get_tensor_model_parallel_group() if ways == "sequence" else None
        part = _own(LOGITS_SBE, ways, rank).clone().requires_grad_()
        means = window_mean_of_part(part, 5, cp_group, sp_group)
        (means * _own(weights, ways, rank)).sum().backward()
        results[ways] = means.detach(), part.grad
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.parametrize("ways", ["sequence", "context"])
def test_parts_of_a_sequence(parts, ways):
    from flexolmo_megatron.model.router_window import window_mean

    whole = LOGITS_SBE.clone().requires_grad_()
    means = window_mean(whole, 5)
    (means * torch.arange(1.0, 25.0)[:, None, None]).sum().backward()
    for rank, results in enumerate(parts):
        for found, expected in zip(results[ways], (means.detach(), whole.grad), strict=True):
            torch.testing.assert_close(found, _own(expected, ways, rank), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def parts():
    return run_distributed(average_parts, 2)
