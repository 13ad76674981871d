"""How far a pair has moved away from its anchor on public text: a divergence of next-token distributions.

Legend: n sequences, s tokens, V vocabulary, of which a tensor-parallel process has V / tp columns.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from flexolmo_megatron.model.pair import anchor_alone


def _log_softmax(logits: Tensor) -> Tensor:
    """This process's columns of the fp32 logarithm of the softmax over the whole vocabulary."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = logits.float()
    largest = logits.amax(dim=-1, keepdim=True)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    logits = logits - largest
    total = logits.exp().sum(dim=-1, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return logits - total.log()


class _Divergence(torch.autograd.Function):
    """KL(p_anchor || p_pair) per token; its gradient by the pair's logits is p_pair - p_anchor."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits: Tensor, anchor_logits: Tensor) -> Tensor:
        log_pair, log_anchor = _log_softmax(logits), _log_softmax(anchor_logits)
        anchor = log_anchor.exp()
        divergence = (anchor * (log_anchor - log_pair)).sum(dim=-1)
        torch.distributed.all_reduce(divergence, group=parallel_state.get_tensor_model_parallel_group())
        ctx.save_for_backward(log_pair.exp_().sub_(anchor))
        return divergence

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradient[..., None], None


def divergence(logits: Tensor, anchor_logits: Tensor) -> Tensor:
    """Return KL(p_anchor || p_pair) in nats, fp32 `[n, s]`, of next-token logits `[n, s, V / tp]`.

    Only the pair's logits get a gradient. Called by all processes that share the vocabulary.
    """
    return _Divergence.apply(logits, anchor_logits)


def losses_and_divergence(model: torch.nn.Module, batch: dict[str, Any], public_B: Tensor) -> tuple[Tensor, Tensor]:
    """Run a pair on a microbatch, and its anchor alone, without gradients, on the public sequences of it.

    Args:
        model: the pair, in one pipeline stage.
        batch: tokens, position_ids and labels `[b, s]`.
        public_B: True for public sequences, of which there is at least one.

    Returns:
        Cross-entropies and divergences in nats, fp32 `[b, s]` each; the latter 0 on the owner's sequences.
    """
    with torch.no_grad(), anchor_alone(model):
        anchor_logits = model(batch["tokens"][public_B], batch["position_ids"][public_B], None)
    logits = model(batch["tokens"], batch["position_ids"], None)
    # Before the cross-entropy: upstream's overwrites the logits.
    found = divergence(logits[public_B], anchor_logits)
    losses = unwrap_model(model).compute_language_model_loss(batch["labels"], logits.transpose(0, 1).contiguous())
    return losses, torch.zeros_like(losses).index_put((public_B,), found)
