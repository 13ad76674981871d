"""What each data-parallel rank writes and reads of a distributed optimizer's state.

A checkpoint has the master weight and the moments of each parameter in the parameter's own shape, under the keys that
upstream's other optimizers give them: any layout can load it, with the distributed optimizer or without. An fp32
parameter is its own master weight, which is not stored twice. Upstream (0.16.1, ``fully_reshardable``) gathers the
whole state on every rank's host to write it, and makes room for all of it to load it. Here a parameter is put together
on the rank that holds the most of it, and read by the ranks that hold something of it: a rank has little more than its
own share in memory.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn


def _states(parameter: nn.Parameter) -> dict[str, str]:
    """What is stored of a parameter's state: upstream's name in the optimizer, and the name in checkpoints."""
    master = {} if parameter.dtype == torch.float32 else {"param": "fp32_param"}
    return {**master, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def sharded_param_state(
    part: DistributedOptimizer, model: dict[str, Any], is_loading: bool, metadata: dict[str, Any] | None = None
) -> dict[int, dict[str, Any]]:
    """Stand in for upstream's ``sharded_param_state_fully_reshardable``, with its arguments. Called by all ranks.

    Returns:
        By the number of the parameter and the name of the state, the ShardedTensors that this rank writes or reads.
    """
    shards, _ = extract_sharded_tensors_and_factories(model)
    by_parameter = {shard.data: shard for shard in nested_values(shards)}
    rank = part.data_parallel_group.rank()
    states = {}
    for number, (parameter, pieces) in enumerate(_pieces(part)):
        sizes = [piece[1] - piece[0] for piece in pieces]
        writer = sizes.index(max(sizes))
        if is_loading:
            whole = {name: torch.zeros(parameter.shape) for name in _states(parameter).values()} if sizes[rank] else {}
        else:
            whole = _put_together(part, parameter, pieces, writer)
        shard = by_parameter[parameter]
        replica = (*shard.replica_id[:-1], int(rank != writer))  # the last of the three counts data-parallel ranks
        for name, data in whole.items():
            dtype = {} if isinstance(shard, ShardedTensorFactory) else {"dtype": data.dtype}
            key = f"optimizer.state.{name}.{shard.key}"
            state = replace(shard, key=key, data=data.view(shard.data.shape), replica_id=replica, **dtype)
            states.setdefault(number, {})[name] = state
    return states


def _pieces(part: DistributedOptimizer) -> Iterator[tuple[nn.Parameter, list[tuple[int, int]]]]:
    """Each parameter, in the order in which upstream numbers them, and the part `[start, end)` of its flat elements
    that each data-parallel rank holds; empty where start is end."""
    ranks = part.data_parallel_group.size()
    for buffer in part.buffers:
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // ranks
            edges = [min(max(bucket.offset + share * rank - start, 0), end - start) for rank in range(ranks + 1)]
            yield parameter, list(zip(edges[:-1], edges[1:], strict=True))


def _put_together(
    part: DistributedOptimizer, parameter: nn.Parameter, pieces: list[tuple[int, int]], writer: int
) -> dict[str, Tensor]:
    """The whole states of a parameter in host memory on the rank ``writer``, by their names in checkpoints; nothing on
    others."""
    group, own = part.data_parallel_group, part.data_parallel_group.rank()
    ranks = torch.distributed.get_process_group_ranks(group)
    start, end = pieces[own]
    states = {}
    if start < end:
        main = part._get_main_param_and_optimizer_states(parameter)
        device = main["param"].device
        states = {stored: main[name].detach() for name, stored in _states(parameter).items()}
    if own != writer:
        for state in states.values():
            torch.distributed.send(state.contiguous(), ranks[writer], group)
        return {}
    whole = {name: torch.empty(parameter.numel()) for name in _states(parameter).values()}
    for rank, (first, last) in enumerate(pieces):
        for name in whole if first < last else ():
            piece = states[name] if rank == own else torch.empty(last - first, device=device)
            if rank != own:
                torch.distributed.recv(piece, ranks[rank], group)
            whole[name][first:last].copy_(piece)
    return whole
