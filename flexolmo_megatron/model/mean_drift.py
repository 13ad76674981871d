"""A penalty on how far an owner's expert moves the mean hidden state of the owner's own documents.

Router rows are linear, so what another owner's row says of these documents on average depends on their mean hidden
state alone. An expert that moves it, in whatever direction its own training likes, can raise the logits of owners whom
it never meets, and no owner can see that. The paper has no such penalty; docs/routing.md has what it gives.

Legend: s sequence, b batch, h hidden size.
"""

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from flexolmo_megatron.model.router import PairRouter
from flexolmo_megatron.runtime.setup import local_device


class MeanDrift:
    """The penalty of one layer: |z|^2 times the owner's share of the tokens, where z is the mean state of the owner's
    tokens less the one expected, each coordinate in its standard deviation.

    No microbatch sees a step's documents whole. So one z is that of the step before, and each token adds the product of
    its own part of z with it. That has the gradient of |z|^2 but for the delay, is the same under every layout, and has
    no part of what z is by chance, which is independent in two steps.
    """

    def __init__(self, expected_h: Tensor, deviation_h: Tensor, coefficient: float) -> None:
        """Begin as if there had been no drift in the step before the first.

        Args:
            expected_h: mean state that the anchor gives the owner's documents. ``DomainVector.moments`` has it for
                whole documents that count the same, while tokens count the same in training: so even the anchor
                itself is a little away from it.
            deviation_h: standard deviation of public tokens' states; all above 0.
            coefficient: weight of the penalty.
        """
        self.expected_h = expected_h.to(local_device(), torch.float64)
        self.deviation_h = deviation_h.to(local_device(), torch.float64)
        self.coefficient = coefficient
        self.drift_h = torch.zeros_like(expected_h, dtype=torch.float32, device=local_device())
        """z of the last step that counted. A checkpoint holds it."""
        self.sums = torch.zeros(len(expected_h) + 1, dtype=torch.float64, device=local_device())
        """This rank's own tokens of the step so far: the sum of their states, and how many."""

    def penalty(self, states_sbh: Tensor, own_b: Tensor) -> Tensor:
        """Return the penalty as a scalar, a mean over tokens whose gradient is half of what it should be (of a product
        one factor alone is differentiated), and note the states.

        Args:
            states_sbh: what the router reads, of this rank's part of the sequences.
            own_b: boolean, True for the owner's documents.
        """
        states_sbh, weight_b = states_sbh.float(), own_b.float()
        with torch.no_grad():
            self.sums[:-1] += torch.einsum("sbh,b->h", states_sbh, weight_b)
            self.sums[-1] += weight_b.sum() * len(states_sbh)
            direction_h = self.drift_h / self.deviation_h
            there = (direction_h @ self.expected_h).float()
        return ((states_sbh @ direction_h.float() - there) * weight_b).mean()

    def advance(self, sums: Tensor) -> None:
        """Go on to the next step.

        Args:
            sums: of all ranks; without any own token the drift stays what it was.
        """
        tokens = sums[-1]
        now_h = (sums[:-1] / tokens.clamp(min=1) - self.expected_h) / self.deviation_h
        self.drift_h = torch.where(tokens > 0, now_h.float(), self.drift_h)


def drifts(chunks: list[nn.Module]) -> dict[int, MeanDrift]:
    """Return the penalties of this rank's layers, by the layer's number from 0; none in a run without them."""
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, PairRouter)]
    return {router.layer_number - 1: router.drift for router in routers if router.drift is not None}


def end_step(chunks: list[nn.Module], counts: bool) -> None:
    """Add up the states of all ranks for the next step. Called by all ranks of a run with the penalty, after the last
    backward pass.

    Args:
        chunks: this rank's part of the model.
        counts: False after a step that is skipped: its states are forgotten.
    """
    found = list(drifts(chunks).values())
    sums = torch.stack([drift.sums for drift in found])
    if counts:
        # Tensor-parallel ranks have parts of each sequence, or all of them the whole: the mean is the same.
        torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_and_data_parallel_group(
            with_context_parallel=True))
    for drift, total in zip(found, sums, strict=True):
        if counts:
            drift.advance(total)
        drift.sums.zero_()
