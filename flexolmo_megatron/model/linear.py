"""The local backend's column-parallel linear layer, without the gradient of an input that needs none."""

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor, nn


class ColumnLinear(ColumnParallelLinear):
    """Megatron's, except where only the weight needs a gradient: in the first layer of a pair.

    What comes before the owner's first FFN is frozen. Upstream's function (tensor_parallel/layers.py, 0.16.1) computes
    the gradient of its input all the same, and sums it over the tensor-parallel ranks. Transformer Engine's layers do
    without by themselves.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.requires_grad or not weight.requires_grad or kwargs["gradient_accumulation_fusion"]:
            return super()._forward_impl(input, weight, *args, **kwargs)
        if kwargs["sequence_parallel"]:
            # Kept whole for the backward pass, where upstream would gather it again.
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        return nn.functional.linear(input, weight, kwargs["bias"])
