"""RMSNorm for the local backend, and RMSNorm over a dimension that tensor parallelism has split.

Legend: s sequence, b batch, n heads, d head size, W = n * d width of the whole projection, t tensor-parallel size.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor; unlike upstream's WrappedTorchNorm it allows sequence
    parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Each rank sees a part of the sequence, so the weight's gradients are summed over the group by
        # finalize_model_grads, which looks for this attribute.
        self.weight.sequence_parallel = config.sequence_parallel


class ProjectionRMSNorm(nn.Module):
    """RMSNorm over a whole query or key projection (OLMo 2), of which this rank holds some heads.

    The mean of squares is taken over all heads of all tensor-parallel ranks; the weight `[W / t]` is split like the
    heads.

    Args:
        config: the model's configuration.
        num_heads: heads of the projection over all ranks (query heads, or key/value groups).
        tp_group: the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, num_heads: int, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.tp_group = tp_group
        self.width = num_heads * config.kv_channels
        self.weight = nn.Parameter(torch.ones(self.width // tp_group.size(), dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x_SBND: Tensor) -> Tensor:
        """Normalise `[s, b, n / t, d]` over all heads; returns the same shape and type."""
        x_SBW = x_SBND.flatten(2)
        if self.tp_group.size() == 1:
            return nn.functional.rms_norm(x_SBW, (self.width,), self.weight, self.eps).view_as(x_SBND)
        x_float = x_SBW.float()
        squares_SB1 = x_float.square().sum(dim=-1, keepdim=True)
        # The sum over ranks forward, and (copy_to) the sum over ranks of its gradient backward: every rank's output
        # depends on every rank's input.
        squares_SB1 = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares_SB1, group=self.tp_group), group=self.tp_group
        )
        normed = x_float * torch.rsqrt(squares_SB1 / self.width + self.eps)
        return (normed * self.weight).type_as(x_SBND).view_as(x_SBND)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict:
        """Megatron's checkpoint description: the weight is split along dimension 0."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
