"""Floating-point operations of one microbatch on one process: a multiplication and an addition are two.

The same count as ``training/flops.py`` has for one process (tests compare them), divided by layout and stage: matrix
products that a step needs, without weight gradients of frozen matrices and without what lies below the first layer that
has something to train. Attention is causal, its backward pass five products for two forward.
"""

from functools import cache

from flexolmo_megatron.launch.plan_activations import expert_tokens
from flexolmo_megatron.launch.plan_work import Chunk, Layout, Work, reached


def _linear(flops: float, trains: bool, gradient: bool) -> float:
    """A product forward, its input's gradient and its weight's."""
    return flops * (1 + gradient + trains)


def _attention(work: Work, layout: Layout, gradient: bool) -> float:
    model = work.model
    tokens = work.sequence * layout.micro_batch / (layout.context * layout.tensor)
    queries, groups = model.hidden_size, model.num_query_groups * model.head_dim
    linear = 2 * tokens * model.hidden_size * (2 * queries + 2 * groups)
    core = 2 * tokens * (work.sequence + 1) * queries
    backward = 2.5 if gradient else 0
    return _linear(linear, work.all_train, gradient) + core * (1 + backward)


def _ffn(flops: float, trains: bool, gradient: bool) -> float:
    """A gated FFN, a third of it the output matrix: to reach the first matrix, a gradient must pass the second."""
    return _linear(flops, trains, gradient) + (flops / 3 if trains and not gradient else 0)


@cache
def _layer(work: Work, layout: Layout, gradient: bool) -> float:
    model = work.model
    tokens = work.sequence * layout.micro_batch / layout.context
    flops = _attention(work, layout, gradient)
    per_row = 6 * model.hidden_size
    if work.kind == "dense":
        return flops + _ffn(tokens * per_row * model.ffn_hidden_size / layout.tensor, work.all_train, gradient)
    flops += _linear(2 * tokens / layout.tensor * model.hidden_size * model.num_experts, True, gradient)
    if work.kind == "pair":
        flops += _ffn(tokens * per_row * model.ffn_hidden_size / layout.tensor, True, gradient)
        return flops + _ffn(tokens * per_row * work.anchor_ffn / layout.tensor, False, gradient)
    experts = expert_tokens(work, layout) * per_row * model.ffn_hidden_size / layout.expert_tensor
    # Also where only the router trains, the scale of the inner state needs its gradient, through the output matrix.
    scale = experts / 3 if work.mode == "router" and not gradient else 0
    return flops + _ffn(experts, work.mode == "moe", gradient) + scale


def chunk_flops(work: Work, layout: Layout, chunk: Chunk) -> float:
    """Return the FLOPs of forward and backward pass of one microbatch in a chunk."""
    flops = _layer(work, layout, reached(work, chunk)) + (chunk.layers - 1) * _layer(work, layout, True)
    if chunk.head:
        tokens = work.sequence * layout.micro_batch / layout.context
        head = 2 * tokens * work.model.hidden_size * work.model.vocab_size / layout.tensor
        flops += head * (2 + work.all_train)
    return flops
