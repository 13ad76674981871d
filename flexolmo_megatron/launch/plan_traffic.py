"""Bytes that one process sends per optimizer step, by kind, and the seconds that takes.

What ``flexolmo train`` asks of Megatron today: no communication is overlapped with computation, gradients are reduced
in fp32, weights gathered in their own type, tokens dispatched by all-to-all. Small messages (sums of norms, router
statistics, the loss) and latencies are left out.

Sizes: a ring all-gather or reduce-scatter of X bytes among n sends X (n - 1) / n per process, an all-reduce twice that.
"""

from dataclasses import dataclass
from functools import cache

from flexolmo_megatron.launch.plan_activations import expert_tokens
from flexolmo_megatron.launch.plan_hardware import GB, Hardware
from flexolmo_megatron.launch.plan_state import State
from flexolmo_megatron.launch.plan_work import Chunk, Layout, Work, alike, reached

KINDS = {
    "tensor": "TP all-gather and reduce-scatter of activations",
    "context": "CP exchange of keys and values",
    "expert": "EP all-to-all of tokens",
    "pipeline": "PP point-to-point of activations and their gradients",
    "data": "DP reduce-scatter of gradients and all-gather of weights",
}
"""Kinds of traffic."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends and seconds that it waits for them, by kind."""

    sent: dict[str, float]
    seconds: dict[str, float]


@cache
def _layer_bytes(work: Work, layout: Layout, gradient: bool) -> dict[str, float]:
    """Bytes that each process sends for one layer and microbatch; ``gradient`` says whether its input needs one."""
    model, element = work.model, work.element
    tokens = layout.tokens(work)
    rows = tokens * model.hidden_size * element
    sent = dict.fromkeys(("tensor", "context", "expert"), 0.0)

    ring = (layout.tensor - 1) / layout.tensor
    # Each block gathers its input and scatters its output, backward the reverse; a weight gradient gathers the input
    # again.
    sent["tensor"] += ring * rows * (2 + 2 * gradient + work.all_train)
    if work.kind == "dense":
        sent["tensor"] += ring * rows * (2 + 2 + work.all_train)
    elif work.kind == "pair":  # two FFNs, each by itself
        own = 3 if gradient else 1 if work.backend == "local" else 2  # the local one keeps the gathered input there
        sent["tensor"] += ring * rows * (2 + own) + ring * rows * (2 + 2 * gradient)
    else:
        copies = expert_tokens(work, layout) * model.hidden_size
        out = 1 + gradient  # to the experts, and the gradients of what they got
        back = 2  # of their outputs; those of the first layer's are needed for the router
        share = (layout.expert_tensor - 1) / layout.expert_tensor
        sent["tensor"] += share * copies * (element * out + 4 * back)  # outputs are summed in the router's fp32
        own = copies / layout.expert_tensor * element
        sent["expert"] += (layout.expert - 1) / layout.expert * own * (out + back)

    keys = 2 * tokens * model.num_query_groups * model.head_dim // layout.tensor * element
    sent["context"] += (layout.context - 1) * keys * (1 + 2 * gradient)  # backward also their gradients
    return sent


def _chunk_bytes(work: Work, layout: Layout, chunk: Chunk) -> dict[str, float]:
    below, above = (_layer_bytes(work, layout, gradient) for gradient in (reached(work, chunk), True))
    sent = {kind: below[kind] + (chunk.layers - 1) * above[kind] for kind in below}
    rows = layout.tokens(work) * work.model.hidden_size * work.element
    ring = (layout.tensor - 1) / layout.tensor
    if chunk.embedding:
        sent["tensor"] += ring * rows * (1 + work.all_train)
    if chunk.head:
        sent["tensor"] += ring * rows * (2 + work.all_train)
    piece = rows / layout.tensor
    first, last = chunk.embedding, chunk.head
    sent["pipeline"] = (0 if last else piece) + (0 if first else piece)  # output on, input's gradient back
    return sent


def microbatch_traffic(work: Work, layout: Layout, stage: int, hardware: Hardware) -> Traffic:
    """Return what pipeline process ``stage`` sends for one microbatch through all of its chunks."""
    sent = dict.fromkeys(("tensor", "context", "expert", "pipeline"), 0.0)
    for chunk, count in alike(work, layout, stage):
        for kind, value in _chunk_bytes(work, layout, chunk).items():
            sent[kind] += count * value
    inner, expert_stride = layout.tensor, layout.expert_tensor
    seconds = {
        "tensor": hardware.ring_seconds(sent["tensor"], max(layout.tensor, layout.expert_tensor), 1),
        "context": hardware.ring_seconds(sent["context"], layout.context, inner),
        "expert": hardware.exchange_seconds(sent["expert"], layout.expert, expert_stride),
        "pipeline": hardware.ring_seconds(sent["pipeline"], layout.pipeline, layout.world // layout.pipeline),
    }
    return Traffic(sent, seconds)


def step_traffic(work: Work, layout: Layout, held: State, hardware: Hardware) -> Traffic:
    """Return what a process with ``held`` sends once per step: gradients, and weights if their optimizer is shared."""
    total, seconds = 0.0, 0.0
    for count, size, stride in (
        (held.trained - held.experts, layout.shards, layout.tensor),
        (held.experts, layout.expert_shards, layout.expert_tensor * layout.expert),
    ):
        each = 4 + work.element if layout.distributed else 2 * 4
        sent = count * each * (size - 1) / size
        total += sent
        seconds += hardware.ring_seconds(sent, size, stride)
    return Traffic({"data": total}, {"data": seconds})


def optimizer_seconds(state: State, work: Work, hardware: Hardware) -> float:
    """Return the time of AdamW, which memory bandwidth bounds: it reads and writes its state, and reads gradients."""
    elements = state.optimizer / work.optimizer_bytes
    return elements * (4 + 3 * 4 * 2 + work.element) / (hardware.memory_bandwidth * GB)
