"""What all ranks of a run must know of each other at each step, so that none waits for one that has given up."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from flexolmo_megatron.runtime.setup import local_device


@dataclass(frozen=True)
class Agreement:
    """What the ranks know of each other at the end of a step's backward pass; the same on every rank."""

    signal: int
    """The stopping signal that some rank has received; 0 for none."""
    loss_rank: int | None
    """The first rank whose own loss is not finite."""
    gradient_rank: int | None
    """The first rank with a gradient that is not finite, before gradients of several ranks were added."""
    norm_overflows: bool
    """The norm of all gradients is not finite."""
    writing: bool
    """Some rank is still writing the last checkpoint."""
    log_failed: bool
    """Rank 0 cannot write the run's log."""

    @property
    def problem(self) -> str | None:
        """Why the step must not change anything."""
        if self.loss_rank is not None:
            return f"the loss is not finite on rank {self.loss_rank}"
        if self.gradient_rank is not None:
            return f"a gradient is not finite on rank {self.gradient_rank}"
        return "the gradient norm is not finite" if self.norm_overflows else None


def agree(
    *, signal: int, own_loss: Tensor, own_gradients: Tensor, norm: float, writing: bool, log_failed: bool
) -> Agreement:
    """Exchange six numbers among all ranks, once per step. Called by all ranks.

    Args:
        signal: what this rank has received; 0 for nothing.
        own_loss: this rank's loss, a scalar.
        own_gradients: a scalar that is finite if, and only if, this rank's gradients are (``largest_gradient``).
        norm: of the gradients of all ranks.
        writing, log_failed: see ``Agreement``.
    """
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    # The smallest of each counts: for a rank number the first, for a negative number whether any rank has it.
    ours = torch.tensor(
        [-signal, ranks, ranks, -int(not norm < float("inf")), -int(writing), -int(log_failed)],
        dtype=torch.int64,
        device=local_device(),
    )
    for place, value in ((1, own_loss), (2, own_gradients)):
        ours[place] = torch.where(torch.isfinite(value), ranks, rank)
    torch.distributed.all_reduce(ours, op=torch.distributed.ReduceOp.MIN)
    signal, loss_rank, gradient_rank, norm_overflows, writing, log_failed = ours.tolist()
    return Agreement(
        -signal,
        None if loss_rank == ranks else loss_rank,
        None if gradient_rank == ranks else gradient_rank,
        bool(norm_overflows),
        bool(writing),
        bool(log_failed),
    )


def agree_on_signal(received: int) -> int:
    """The stopping signal that some rank has received; 0 for none. Called by all ranks.

    Args:
        received: by this rank; 0 for none.
    """
    signal = torch.tensor(received, dtype=torch.int64, device=local_device())
    torch.distributed.all_reduce(signal, op=torch.distributed.ReduceOp.MAX)
    return int(signal.item())


@torch.no_grad()
def largest_gradient(chunks: Iterable[DistributedDataParallel]) -> Tensor:
    """The largest absolute gradient in this rank's buffers; NaN where there is one. A scalar, without a device sync."""
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    largest = [torch.linalg.vector_norm(buffer.grad_data, ord=float("inf")) for buffer in buffers]
    return torch.stack(largest).max() if largest else torch.zeros((), device=local_device())
