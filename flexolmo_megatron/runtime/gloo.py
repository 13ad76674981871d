"""Collectives on parts of unequal size, which gloo lacks: Megatron's alltoall dispatcher needs them where experts are
split over tensor-parallel processes. NCCL has them, so they are for the CPU runtime alone."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor


def _equal(parts: list[Tensor]) -> bool:
    return len({part.shape for part in parts}) == 1


def allow_unequal_parts() -> None:
    """Let torch.distributed.all_gather and reduce_scatter take parts of unequal size; one message per part then."""
    gather, scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    @wraps(gather)
    def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if async_op or _equal(tensor_list):
            return gather(tensor_list, tensor, group=group, async_op=async_op)
        own = torch.distributed.get_rank(group)
        for rank, part in enumerate(tensor_list):
            if rank == own:
                part.copy_(tensor)
            if part.numel():
                torch.distributed.broadcast(part, group=group, group_src=rank)
        return None

    @wraps(scatter)
    def reduce_scatter(output: Tensor, input_list: list[Tensor], *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if args or kwargs or _equal(input_list):
            return scatter(output, input_list, *args, group=group, **kwargs)
        own = torch.distributed.get_rank(group)
        for rank, part in enumerate(input_list):
            total = part.clone()
            if total.numel():
                torch.distributed.reduce(total, group=group, group_dst=rank)
            if rank == own:
                output.copy_(total)
        return None

    torch.distributed.all_gather, torch.distributed.reduce_scatter = all_gather, reduce_scatter
