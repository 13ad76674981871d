"""Bytes that autograd keeps from the forward to the backward pass of one microbatch, and the most of them at once.

Counted tensor by tensor from what the modules of ``model/`` save. With the local modules the count is exact (compared
with autograd's saved tensors in tests/launch/test_plan_trace.py, and with a process's peak memory in
tests/launch/test_plan_peak.py). Transformer Engine's modules differ where ``work.backend == "te"`` says so; that part
is from their source and not measured. Experts are taken to get equal numbers of tokens. Of a frozen matrix the input is
not kept, and nothing is kept below the first layer that has something to train.

Names: ``tokens`` of a microbatch on this process, ``split`` the same where the sequence is split (tokens / TP),
``width`` of an FFN's inner state on this process, ``copies`` of tokens that reach this process's experts.
"""

from dataclasses import dataclass
from functools import cache

from flexolmo_megatron.launch.plan_work import Chunk, Layout, Work, chunks, reached


@dataclass(frozen=True)
class Activations:
    """What one process keeps at its peak, in bytes."""

    kept: int
    """From all microbatches that are between their forward and their backward pass."""
    passing: int
    """The largest temporary tensors of one layer's, or the head's, backward pass."""

    @property
    def total(self) -> int:
        return self.kept + self.passing


def _tokens(work: Work, layout: Layout) -> tuple[int, int]:
    whole = layout.tokens(work)
    return whole, whole // layout.tensor if layout.sequence else whole


def _norm(work: Work, tokens: int, width: int, trains: bool, fused: bool) -> int:
    """RMSNorm: a fused kernel keeps its input and one number per token; else an fp32 copy, and one of the result."""
    if fused:
        return tokens * (width * work.element + 4)
    return tokens * (width * 4 * (2 if trains else 1) + 4)


def _attention(work: Work, layout: Layout) -> int:
    model, element = work.model, work.element
    tokens, split = _tokens(work, layout)
    queries = model.num_attention_heads * model.head_dim // layout.tensor
    groups = model.num_query_groups * model.head_dim // layout.tensor
    fused_norm = work.backend == "te" and layout.tensor == 1
    kept = _norm(work, tokens, queries, work.all_train, fused_norm)
    kept += _norm(work, tokens, groups, work.all_train, fused_norm)
    kept += tokens * (queries + 2 * groups) * element  # the whole projection, of which the values are a view
    kept += tokens * (queries + groups) * element  # queries and keys after RoPE
    kept += tokens * (queries * element + 4 * model.num_attention_heads // layout.tensor)  # result, log of the sums
    if work.backend == "local":
        kept += 4 * work.sequence // layout.context * model.head_dim * element  # cosines and sines, for q and for k
    if work.all_train:
        kept += split * model.hidden_size * element  # input of the projection
    return kept + _norm(work, split, model.hidden_size, work.all_train, work.backend == "te")


def _swiglu(work: Work, tokens: int, width: int, trains: bool, gradient: bool) -> int:
    """A dense FFN without its input: gate and up where a gradient passes, their product where fc2 trains."""
    return tokens * width * work.element * (2 * gradient + trains)


def _dense_ffn(work: Work, layout: Layout) -> int:
    tokens, split = _tokens(work, layout)
    kept = _swiglu(work, tokens, work.model.ffn_hidden_size // layout.tensor, work.all_train, True)
    return kept + (split * work.model.hidden_size * work.element if work.all_train else 0)


def _pair_ffn(work: Work, layout: Layout, gradient: bool) -> int:
    model, element = work.model, work.element
    tokens, split = _tokens(work, layout)
    kept = split * model.hidden_size * element  # input of router and expert
    if not gradient and layout.tensor > 1 and work.backend == "local":
        kept += tokens * model.hidden_size * element  # the expert's, gathered (model/linear.py)
    kept += 2 * model.hidden_size * element  # the two rows as one matrix
    kept += split * (2 * 2 * 4 + 4) + 4  # logits for the z-loss, log of the sums, softmax; a factor
    kept += split * element if element == 2 else 0  # the owner's share as a number of the model's type
    kept += _swiglu(work, tokens, model.ffn_hidden_size // layout.tensor, True, True)
    kept += _swiglu(work, tokens, work.anchor_ffn // layout.tensor, False, gradient)
    return kept + 2 * split * model.hidden_size * element  # both outputs, for the mean


def expert_tokens(work: Work, layout: Layout) -> int:
    """Token copies that reach one process's experts from one microbatch, if all get equally many."""
    _, split = _tokens(work, layout)
    return split * work.model.top_k * layout.expert_tensor


def _mixture_ffn(work: Work, layout: Layout, gradient: bool) -> int:
    model, element = work.model, work.element
    _, split = _tokens(work, layout)
    copies, width = expert_tokens(work, layout), model.ffn_hidden_size // layout.expert_tensor
    kept = split * model.hidden_size * element  # input of the router
    kept += split * model.num_experts * (4 + 4 + 4 + 1)  # logits, softmax, the same transposed, map
    kept += 4 * split + 4  # log of the sums, a factor
    kept += split * model.top_k * 8 * 2  # indices of the experts, order of the tokens
    if gradient:
        # gate and up; unfused also silu(gate), up once more and the product before it is scaled.
        kept += copies * width * element * (2 if work.backend == "te" else 5) + 4 * copies
    else:
        kept += copies * width * element * (2 if work.backend == "te" else 1)
    if work.mode == "moe":
        kept += copies * (width + model.hidden_size) * element  # inputs of both matrices
    return kept


@cache
def _layer(work: Work, layout: Layout, gradient: bool) -> int:
    """One layer; ``gradient`` says whether its input needs one."""
    _, split = _tokens(work, layout)
    kept = _attention(work, layout) if gradient else 0
    if work.kind == "dense":
        kept += _dense_ffn(work, layout)
    elif work.kind == "pair":
        kept += _pair_ffn(work, layout, gradient)
    else:
        kept += _mixture_ffn(work, layout, gradient)
    return kept + _norm(work, split, work.model.hidden_size, work.all_train, work.backend == "te")


def chunk_activations(work: Work, layout: Layout, chunk: Chunk) -> int:
    """Return what one microbatch leaves in a chunk's layers and embedding; for the head see ``head_activations``."""
    tokens, split = _tokens(work, layout)
    embedding = 0
    if chunk.embedding and work.all_train:
        embedding = 8 * tokens + (tokens if layout.tensor > 1 else 0)
    return embedding + _layer(work, layout, reached(work, chunk)) + (chunk.layers - 1) * _layer(work, layout, True)


def head_activations(work: Work, layout: Layout) -> int:
    """Return what one microbatch leaves in the final norm, the output layer and the loss."""
    tokens, split = _tokens(work, layout)
    kept = _norm(work, split, work.model.hidden_size, work.all_train, work.backend == "te")
    if work.all_train:
        kept += split * work.model.hidden_size * work.element
    return kept + tokens * (4 * work.model.vocab_size // layout.tensor + 1 + 8)  # softmax in fp32, mask, target


def _passing_layer(work: Work, layout: Layout) -> int:
    """Gradients in flight in an FFN's backward pass: of its output, inner state and input, and of one matrix."""
    model, element = work.model, work.element
    tokens, split = _tokens(work, layout)
    if work.kind == "moe":
        width, rows = model.ffn_hidden_size // layout.expert_tensor, expert_tokens(work, layout)
        # The local modules take expert by expert.
        inner = rows if work.backend == "te" else rows * layout.expert // model.num_experts
        flowing = inner * 4 * width + 2 * rows * model.hidden_size
    else:
        width = max(model.ffn_hidden_size, work.anchor_ffn if work.kind == "pair" else 0) // layout.tensor
        flowing = tokens * 4 * width
    trains = work.all_train or work.kind == "pair"
    # Transformer Engine adds the gradient of a matrix into its buffer as it computes it.
    matrix = 2 * width * model.hidden_size if trains and work.backend == "local" else 0
    return (max(flowing, flowing // 2 + matrix) + 3 * split * model.hidden_size) * element


def peak_activations(work: Work, layout: Layout, stage: int) -> Activations:
    """Return the most that pipeline process ``stage`` keeps at once.

    Source of the numbers in flight: megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches (0.16.1).
    """
    held = chunks(work, layout, stage)
    sizes = [chunk_activations(work, layout, chunk) for chunk in held]
    flight = in_flight(work, layout, stage)
    kept = sum(sizes[index // layout.pipeline % layout.virtual] for index in range(flight))
    layer = _passing_layer(work, layout)
    if not held[-1].head:
        return Activations(kept, layer)
    tokens, split = _tokens(work, layout)
    # bfloat16 logits beside their fp32 copy; then only the layers' tensors while the backward pass goes through them.
    logits = tokens * work.model.vocab_size // layout.tensor * work.element
    matrix = work.model.vocab_size // layout.tensor * work.model.hidden_size * work.element if work.all_train else 0
    head = head_activations(work, layout)
    passing = (logits if work.element == 2 else 0) + max(split * work.model.hidden_size * work.element, matrix)
    if head + passing >= layer:
        return Activations(kept + head, passing)
    return Activations(kept, layer)


def in_flight(work: Work, layout: Layout, stage: int) -> int:
    """Return how many forward passes of a chunk wait for their backward pass at the most."""
    microbatches = layout.microbatches(work)
    if layout.virtual == 1:
        return min(layout.pipeline - stage, microbatches)
    warm_up = (layout.pipeline - stage - 1) * 2 + (layout.virtual - 1) * layout.pipeline
    return min(warm_up + 1, microbatches * layout.virtual)
