"""Attribution: how much of the routing weight each expert had, token by token.

Legend: s sequence, b batch, T = s * b tokens, L layers, E experts.
"""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from flexolmo_megatron.inference.access import routers_of


class RoutingWeights:
    """Within a ``with`` block, keeps the routing weights of the model's latest forward pass.

    A token's weights are the probabilities of its chosen experts, scaled to sum to one: a common scale of them is lost
    in the norm on the layer's output, so it says nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare to listen to the routers of ``model`` (of kind moe; one without routers gives no layers)."""
        self._routers = routers_of(model)
        self._layers: list[Tensor] = [torch.empty(0)] * len(self._routers)
        self._handles: list[Any] = []

    def __enter__(self) -> "RoutingWeights":
        for layer, router in enumerate(self._routers):
            def hook(module: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor], layer: int = layer) -> None:
                probs_TE = output[0] * output[1]
                shares_TE = probs_TE / probs_TE.sum(dim=-1, keepdim=True)
                self._layers[layer] = shares_TE.view(*arguments[0].shape[:2], -1)

            self._handles.append(router.register_forward_hook(hook))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def mean_over_layers(self) -> Tensor:
        """The latest pass's weights, fp32 `[s, b, E]`; `[0]` for a model without routers."""
        return torch.stack(self._layers).mean(dim=0) if self._layers else torch.empty(0)
