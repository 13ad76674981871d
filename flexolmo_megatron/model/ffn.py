"""The SwiGLU feed-forward network of a dense layer and of both halves of a pair.

Legend: s sequence, b batch, H hidden, F inner width.
"""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only its input for the backward pass and writing both gradients in place.

    Upstream's fused function does the same through torch.compile, which pays on CUDA only; without that it makes a
    dozen passes over memory.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        scratch = torch.nn.functional.silu(gate)
        torch.mul(gradient, scratch, out=up_gradient)
        torch.mul(gradient, up, out=scratch)
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=gate_gradient)
        return result


def swiglu(gate_up: Tensor) -> Tensor:
    """Map `[..., 2F]`, the gate's half first, to silu(gate) * up `[..., F]`."""
    if gate_up.is_cuda:
        return bias_swiglu_impl(gate_up, None)
    return _SwiGLU.apply(gate_up)


class GatedFFN(MLP):
    """Megatron's MLP for the one case here: SwiGLU without biases."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Map `[s, b, H]` to `[s, b, H]`; the second value is the absent bias."""
        gate_up, _ = self.linear_fc1(hidden_states)
        output, _ = self.linear_fc2(swiglu(gate_up))
        return output, None
