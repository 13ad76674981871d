"""Which parallel layouts a model can be trained in: arithmetic alone, before any process group exists.

The rules are Megatron-core's (0.16.1) and those of our own modules, where they are narrower: key/value groups are
split, never repeated, and the vocabulary is not padded, so that every checkpoint has the architecture's own shapes.
Used by `flexolmo train` before it starts, and by `flexolmo plan` to leave out what cannot run.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Literal

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import ParallelConfig
from flexolmo_megatron.errors import FlexOlmoError

ModelKind = Literal["dense", "moe", "pair"]
"""How a model is built; a pair is an owner's expert beside the anchor."""
DISPATCHERS = ("alltoall", "allgather")


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return how many copies of the model a launch of ``world_size`` processes trains.

    Raises:
        FlexOlmoError: the processes cannot be divided like that.
    """
    for problem in process_problems(parallel, world_size):
        raise FlexOlmoError(problem)
    return world_size // (parallel.tensor * parallel.pipeline * parallel.context)


def layout_problem(
    model: ModelConfig,
    kind: ModelKind,
    parallel: ParallelConfig,
    *,
    world_size: int,
    seq_length: int,
    microbatches: int,
    anchor_ffn_hidden_size: int | None = None,
) -> str | None:
    """Return why a layout cannot work, as one sentence with the numbers, or None.

    Args:
        model: the architecture; for a pair, of the coupled model (ffn_hidden_size is the owner's).
        kind: what is trained: dense, pair (an owner's run) or moe.
        parallel: the layout.
        world_size: number of processes.
        seq_length: tokens per sample.
        microbatches: per step and pipeline.
        anchor_ffn_hidden_size: pair only; None where it is the owner's.
    """
    problems = chain(
        process_problems(parallel, world_size),
        _pipeline_problems(model, parallel, microbatches),
        _expert_problems(kind, parallel),
        split_problems(model, kind, parallel, anchor_ffn_hidden_size),
        _sequence_problems(kind, parallel, seq_length),
    )
    return next(problems, None)


def check_layout(model: ModelConfig, kind: ModelKind, parallel: ParallelConfig, **sizes: int | None) -> None:
    """Refuse a layout that cannot work; takes what ``layout_problem`` takes.

    Raises:
        FlexOlmoError: with what ``layout_problem`` says.
    """
    if problem := layout_problem(model, kind, parallel, **sizes):
        raise FlexOlmoError(problem)


def process_problems(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """Yield why ``world_size`` processes cannot be divided like that, whatever the model."""
    for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert"):
        if getattr(parallel, name) < 1:
            yield f"parallel.{name} = {getattr(parallel, name)}: expected at least 1"
    if parallel.expert_tensor is not None and parallel.expert_tensor < 1:
        yield f"parallel.expert_tensor = {parallel.expert_tensor}: expected at least 1"
    if world_size % (parallel.tensor * parallel.pipeline * parallel.context):
        context = f" times parallel.context = {parallel.context}" if parallel.context > 1 else ""
        yield (
            f"parallel.tensor = {parallel.tensor} times parallel.pipeline = {parallel.pipeline}{context} does not "
            f"divide the number of processes, {world_size}"
        )
    expert_tensor = parallel.expert_tensor or parallel.tensor
    if world_size % (expert_tensor * parallel.expert * parallel.pipeline):
        yield (
            f"parallel.expert = {parallel.expert} times parallel.expert_tensor = {expert_tensor} times "
            f"parallel.pipeline = {parallel.pipeline} does not divide the number of processes, {world_size}"
        )


def _pipeline_problems(model: ModelConfig, parallel: ParallelConfig, microbatches: int) -> Iterator[str]:
    stages = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} with parallel.pipeline = 1: virtual stages "
            f"need parallel.pipeline above 1"
        )
    if model.num_layers % stages:
        virtual = (
            f" times parallel.virtual_pipeline = {parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
        )
        yield f"parallel.pipeline = {parallel.pipeline}{virtual} does not divide model.num_layers = {model.num_layers}"
    if parallel.virtual_pipeline > 1 and microbatches % parallel.pipeline:
        yield (
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} needs a number of microbatches that "
            f"parallel.pipeline = {parallel.pipeline} divides, but global_batch_size / (micro_batch_size * "
            f"data-parallel processes) = {microbatches}"
        )


def _expert_problems(kind: ModelKind, parallel: ParallelConfig) -> Iterator[str]:
    if kind != "moe":
        what = "an owner's pair, which dispatches no tokens" if kind == "pair" else "a dense model"
        if parallel.expert > 1:
            yield f"parallel.expert = {parallel.expert}: expected 1 for {what}"
        if parallel.expert_tensor is not None and parallel.expert_tensor != parallel.tensor:
            yield f"parallel.expert_tensor = {parallel.expert_tensor}: expected no value for {what}"
        return
    if parallel.moe_token_dispatcher_type not in DISPATCHERS:
        yield (
            f"parallel.moe_token_dispatcher_type = {parallel.moe_token_dispatcher_type!r}: expected one of "
            f"{', '.join(DISPATCHERS)}"
        )
    if parallel.expert == 1 and parallel.expert_tensor not in (None, parallel.tensor):
        # Megatron sums an expert's gradients over the right processes only where parallel.expert is above 1.
        yield (
            f"parallel.expert_tensor = {parallel.expert_tensor} with parallel.expert = 1: expected no value, or "
            f"parallel.tensor = {parallel.tensor}"
        )


def split_problems(
    model: ModelConfig, kind: ModelKind, parallel: ParallelConfig, anchor_ffn_hidden_size: int | None = None
) -> Iterator[str]:
    """Yield why tensors of a model cannot be split over ``parallel.tensor``, ``expert`` and ``expert_tensor``."""
    for name in ("num_attention_heads", "num_query_groups", "vocab_size"):
        if getattr(model, name) % parallel.tensor:
            yield _not_split(f"model.{name}", getattr(model, name), "parallel.tensor", parallel.tensor)
    if kind == "moe":
        width_name, width_size = "parallel.expert_tensor", parallel.expert_tensor or parallel.tensor
    else:
        width_name, width_size = "parallel.tensor", parallel.tensor
    if model.ffn_hidden_size % width_size:
        field = "expert.ffn_hidden_size" if kind == "pair" else "model.ffn_hidden_size"
        yield _not_split(field, model.ffn_hidden_size, width_name, width_size)
    if anchor_ffn_hidden_size is not None and anchor_ffn_hidden_size % parallel.tensor:
        yield _not_split("the anchor's ffn_hidden_size", anchor_ffn_hidden_size, width_name, parallel.tensor)
    if model.num_experts % parallel.expert:
        yield _not_split("model.num_experts", model.num_experts, "parallel.expert", parallel.expert)


def _not_split(name: str, value: int, over: str, size: int) -> str:
    return f"{name} = {value} cannot be split over {over} = {size} processes"


def _sequence_problems(kind: ModelKind, parallel: ParallelConfig, seq_length: int) -> Iterator[str]:
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence = true: expected parallel.tensor above 1"
    if kind == "moe" and parallel.tensor > 1 and not parallel.sequence:
        yield (
            f"parallel.tensor = {parallel.tensor} for a mixture: Megatron trains one only with "
            f"parallel.sequence=true then"
        )
    if parallel.context > 1 and seq_length % (2 * parallel.context):
        yield f"data.seq_length = {seq_length}: expected a multiple of 2 * parallel.context = {2 * parallel.context}"
    if parallel.sequence and seq_length // parallel.context % parallel.tensor:
        within = f" / parallel.context = {seq_length // parallel.context}" if parallel.context > 1 else ""
        yield (
            f"data.seq_length = {seq_length}{within} cannot be split over parallel.tensor = {parallel.tensor} "
            f"processes, which parallel.sequence needs"
        )
