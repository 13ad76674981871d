"""Which experts a model chooses: the share of each, by layer, over the tokens of a text (arXiv 2507.07024, figure 2).

Two shares per expert: of the routing weight (each token's top-k probabilities, scaled to sum to one), and of the first
choices (the tokens for which it has the largest probability).

Legend: b sequences, s positions of a sequence, N counted positions, L layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexolmo_megatron.inference.attribution import RoutingWeights


@dataclass(frozen=True)
class RoutingShare:
    """Shares of the experts, each between 0 and 1; every layer's sum to one."""

    experts: list[str]
    """Names, in the order of the shares."""
    weight: list[list[float]]
    """Share of routing weight: a list per layer, a number per expert."""
    first_choice: list[list[float]]
    """Share of tokens that choose this expert first: a list per layer, a number per expert."""


class RoutingRecorder(RoutingWeights):
    """Within a ``with`` block, adds up the routing of a model over many forward passes."""

    def __init__(self, model: nn.Module, expert_names: Sequence[str]) -> None:
        """Prepare to listen to the routers of ``model``; the names are in the order of the router's rows."""
        super().__init__(model)
        self._experts = list(expert_names)
        self._weight_LE = torch.zeros(len(self._layers), len(self._experts), dtype=torch.float64)
        self._first_LE = self._weight_LE.clone()

    def add(self, counted_bs: Tensor) -> None:
        """Count the latest forward pass at the positions that are True in ``counted_bs``, `[b, s]`."""
        for layer, shares_sbE in enumerate(self._layers):
            chosen_NE = shares_sbE[counted_bs.T.to(shares_sbE.device)].double()
            self._weight_LE[layer] += chosen_NE.sum(dim=0).cpu()
            self._first_LE[layer] += torch.bincount(chosen_NE.argmax(dim=1), minlength=len(self._experts)).cpu()

    def share(self) -> RoutingShare | None:
        """The shares over everything that was added; None for a model without routers."""
        if not len(self._layers):
            return None
        weight, first = (total / total.sum(dim=1, keepdim=True) for total in (self._weight_LE, self._first_LE))
        return RoutingShare(self._experts, weight.tolist(), first.tolist())
