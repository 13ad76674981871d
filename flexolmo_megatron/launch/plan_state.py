"""Bytes of weights, gradients and optimizer state of one process, tensor by tensor as Megatron lays them out.

Source: megatron/core/distributed/param_and_grad_buffer.py and optimizer/distrib_optimizer.py (0.16.1), with what
``training/start.py`` sets: gradients in fp32, one bucket per buffer. Compared with the built model in
tests/launch/test_plan_shapes.py. The names are the local modules'; Transformer Engine's stacked experts have the same
sizes in another order, which can move paddings of up to 63 elements from one process to the next.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from flexolmo_megatron.launch.plan_work import Chunk, Layout, Work, chunks


@dataclass(frozen=True)
class Parameter:
    """One parameter of this process."""

    name: str
    shape: tuple[int, ...]
    trains: bool
    expert: bool = False
    """Whether it lies in the buffers of expert parallelism."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class State:
    """What one process holds all the time."""

    weights: int
    """Bytes."""
    gradients: int
    """Bytes."""
    optimizer: int
    """Bytes of fp32 master weights (where weights are bfloat16) and of two fp32 moments."""
    trained: int
    """Parameters that train."""
    experts: int
    """Of these, experts in the buffers of expert parallelism."""
    frozen: int
    """Parameters that do not."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


_NOTHING = State(0, 0, 0, 0, 0, 0)


def _sum(states: Iterable[State]) -> State:
    return State(*map(sum, zip(*(vars(state).values() for state in states), strict=True)))


def chunk_parameters(work: Work, layout: Layout, chunk: Chunk) -> list[Parameter]:
    """Return the parameters of a chunk in the order of Megatron's modules, which is that of its buffers."""
    model, tensor = work.model, layout.tensor
    every = work.all_train
    vocabulary = (model.vocab_size // tensor, model.hidden_size)
    result = []
    if chunk.embedding:
        result.append(Parameter("embedding.word_embeddings.weight", vocabulary, every))
    for index in range(chunk.layers):
        prefix = f"decoder.layers.{index}."
        result += [Parameter(prefix + p.name, p.shape, p.trains, p.expert) for p in _layer(work, layout)]
    if chunk.head:
        result.append(Parameter("decoder.final_layernorm.weight", (model.hidden_size,), every))
        result.append(Parameter("output_layer.weight", vocabulary, every))
    return result


def _layer(work: Work, layout: Layout) -> list[Parameter]:
    model, tensor, every = work.model, layout.tensor, work.all_train
    h, head = model.hidden_size, model.head_dim
    queries, groups = model.num_attention_heads * head // tensor, model.num_query_groups * head // tensor
    return [
        Parameter("self_attention.linear_proj.weight", (h, queries), every),
        Parameter("self_attention.linear_qkv.weight", (queries + 2 * groups, h), every),
        Parameter("self_attention.q_layernorm.weight", (queries,), every),
        Parameter("self_attention.k_layernorm.weight", (groups,), every),
        *{"dense": _dense, "pair": _pair, "moe": _mixture}[work.kind](work, layout),
        Parameter("post_self_attn_layernorm.weight", (h,), every),
        Parameter("post_mlp_layernorm.weight", (h,), every),
    ]


def _ffn(prefix: str, h: int, width: int, trains: bool, expert: bool = False) -> list[Parameter]:
    return [
        Parameter(f"{prefix}.linear_fc1.weight", (2 * width, h), trains, expert),
        Parameter(f"{prefix}.linear_fc2.weight", (h, width), trains, expert),
    ]


def _dense(work: Work, layout: Layout) -> list[Parameter]:
    return _ffn("mlp", work.model.hidden_size, work.model.ffn_hidden_size // layout.tensor, work.all_train)


def _pair(work: Work, layout: Layout) -> list[Parameter]:
    h = work.model.hidden_size
    bias = [Parameter("mlp.router.bias", (1,), True)] if work.model.router_bias else []
    return [
        *_ffn("mlp.anchor", h, work.anchor_ffn // layout.tensor, False),
        *_ffn("mlp.expert", h, work.model.ffn_hidden_size // layout.tensor, True),
        *bias,
        Parameter("mlp.router.public_row", (1, h), False),
        Parameter("mlp.router.row", (1, h), True),
    ]


def _mixture(work: Work, layout: Layout) -> list[Parameter]:
    model, trains = work.model, work.mode in ("moe", "router")
    result = [Parameter("mlp.router.weight", (model.num_experts, model.hidden_size), trains)]
    if model.router_bias:
        result.append(Parameter("mlp.router.bias", (model.num_experts,), trains))
    for index in range(model.num_experts // layout.expert):
        result += _ffn(
            f"mlp.experts.local_experts.{index}",
            model.hidden_size,
            model.ffn_hidden_size // layout.expert_tensor,
            work.mode == "moe",
            layout.expert > 1,
        )
    return result


def _pad(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


def _buffer(
    work: Work, parameters: list[Parameter], shards: int, rank: int, distributed: bool, experts: bool = False
) -> State:
    """One buffer of gradients (and, with the distributed optimizer, weights) and this process's part of its state.

    Args:
        parameters: in the order of the modules; the buffer has them in reverse.
        shards: processes that share the optimizer's state.
        rank: of this process among them.
        distributed: whether the optimizer is.
        experts: whether this is a buffer of expert parallelism.
    """
    sizes = [parameter.size for parameter in parameters]
    if not sizes:
        return _NOTHING
    places, end = [], 0
    for size in reversed(sizes):
        begin = _pad(end, 64) if distributed else end
        end = begin + size
        places.append((begin, end))
    whole = _pad(end, math.lcm(shards, 128)) if distributed else end
    mine = (0, whole)
    if distributed:
        mine = (rank * (whole // shards), (rank + 1) * (whole // shards))
    held = [part for begin, end in places if (part := min(end, mine[1]) - max(begin, mine[0])) > 0]
    # torch's AdamW has 4 bytes more per tensor.
    optimizer = sum(held) * work.optimizer_bytes + (4 * len(held) if work.backend == "local" else 0)
    return State(whole * work.element, whole * 4, optimizer, sum(sizes), sum(sizes) if experts else 0, 0)


@cache
def _chunk_state(work: Work, layout: Layout, chunk: Chunk, rank: int, expert_rank: int) -> State:
    parameters = chunk_parameters(work, layout, chunk)
    trained = [p for p in parameters if p.trains]
    frozen = sum(p.size for p in parameters if not p.trains)
    dense, experts = [p for p in trained if not p.expert], [p for p in trained if p.expert]
    return _sum(
        [
            _buffer(work, dense, layout.shards, rank, layout.distributed),
            _buffer(work, experts, layout.expert_shards, expert_rank, layout.distributed, experts=True),
            State(frozen * work.element, 0, 0, 0, 0, frozen),
        ]
    )


def state(work: Work, layout: Layout, stage: int, rank: int = 0, expert_rank: int = 0) -> State:
    """Return what a process holds all the time.

    Args:
        work: the run.
        layout: how it is divided.
        stage: pipeline process.
        rank: of the process among the DP x CP processes with the same parameters; only the optimizer's part depends on
            it. Rank 0 has the most.
        expert_rank: the same for experts, among ``layout.expert_shards``.
    """
    return _state(work, layout.still, stage, rank, expert_rank)


@cache
def _state(work: Work, layout: Layout, stage: int, rank: int, expert_rank: int) -> State:
    return _sum(_chunk_state(work, layout, _moved(chunk), rank, expert_rank) for chunk in chunks(work, layout, stage))


def _moved(chunk: Chunk) -> Chunk:
    """The same chunk at the model's start: where it lies does not change its parameters."""
    return Chunk(0, chunk.layers, chunk.embedding, chunk.head)
