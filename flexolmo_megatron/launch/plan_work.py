"""What is planned: a run's architecture, batch and number type, and the ways to divide it over GPUs."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import MappingProxyType
from typing import Literal

from flexolmo_megatron.config.layout import ModelKind, layout_problem, process_problems
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import ParallelConfig, TrainConfig
from flexolmo_megatron.errors import FlexOlmoError

Mode = Literal["anchor", "dense", "expert", "moe", "router", "inference"]
MODES: tuple[Mode, ...] = ("anchor", "dense", "expert", "moe", "router", "inference")
Backend = Literal["te", "local"]


@dataclass(frozen=True, eq=False)  # compared and cached by identity
class Work:
    """One optimizer step of a run."""

    mode: Mode
    """As `flexolmo train` has it, or inference, where nothing trains."""
    kind: ModelKind
    """What is built: dense, pair or moe."""
    model: ModelConfig
    """Architecture; of the coupled model for a pair, whose ffn_hidden_size is the owner's."""
    anchor_ffn: int
    """Pair only: inner width of the anchor's FFN."""
    sequence: int
    """Tokens per sample."""
    batch: int
    """Samples per step over all processes."""
    element: int
    """Bytes of one weight or activation: 2 (bfloat16) or 4 (float32)."""
    backend: Backend
    """Whose modules keep activations: Transformer Engine's on CUDA, or the local ones on the CPU."""

    @property
    def all_train(self) -> bool:
        """Whether every parameter trains."""
        return self.mode in ("anchor", "dense", "moe")

    @property
    def optimizer_bytes(self) -> int:
        """Of one trained parameter: two fp32 moments, and an fp32 copy where weights are bfloat16."""
        return 12 if self.element == 2 else 8

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.sequence


def work_of(config: TrainConfig, mode: Mode, backend: Backend) -> Work:
    """Return what ``flexolmo train MODE`` does with a configuration, as ``training/start.py`` builds it.

    Raises:
        FlexOlmoError: the architecture has not the experts that the mode needs, or an impossible value.
    """
    model, kind = config.model, "dense"
    if mode == "expert":
        kind = "pair"
        expert = config.expert
        model = model.pair(expert.ffn_hidden_size, expert.bias, expert.router_window, "model.ffn_hidden_size =")
    elif mode in ("moe", "router") or (mode == "inference" and model.num_experts):
        if model.num_experts < 2:
            raise FlexOlmoError(
                f"model.num_experts = {model.num_experts}: expected 2 or more for --mode {mode}, for example with "
                f"--preset 37b"
            )
        kind = "moe"
    else:
        model = model.dense()
    for name in ("global_batch_size", "train_iters"):
        if getattr(config, name) < 1:
            raise FlexOlmoError(f"{name} = {getattr(config, name)}: expected at least 1")
    if not 1 <= config.data.seq_length <= model.max_position_embeddings:
        raise FlexOlmoError(
            f"data.seq_length = {config.data.seq_length}: expected 1 to model.max_position_embeddings = "
            f"{model.max_position_embeddings}"
        )
    return Work(
        mode,
        kind,
        model,
        config.model.ffn_hidden_size,
        config.data.seq_length,
        config.global_batch_size,
        2 if config.bf16 else 4,
        backend,
    )


@dataclass(frozen=True)
class Layout:
    """One way to divide a run over processes, one process per GPU."""

    world: int
    """Processes."""
    tensor: int = 1
    """Processes that share each matrix (TP); sequence parallel is on where it is above 1."""
    pipeline: int = 1
    """Processes that share the layers (PP)."""
    virtual: int = 1
    """Groups of layers per pipeline process (VPP)."""
    context: int = 1
    """Processes that share each sequence (CP)."""
    expert: int = 1
    """Processes that share a layer's experts (EP)."""
    expert_tensor: int = 0
    """Processes that share each expert's matrices (ETP); 0 becomes ``tensor``."""
    micro_batch: int = 1
    """Samples that one process computes at a time."""
    distributed: bool = True
    """Spread optimizer state over the data-parallel processes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_tensor", self.expert_tensor or self.tensor)

    @cached_property
    def _hash(self) -> int:
        return hash((self.world, *self.groups, self.virtual, self.micro_batch, self.distributed))

    def __hash__(self) -> int:  # layouts are keys of many caches: once is enough
        return self._hash

    @property
    def groups(self) -> tuple[int, ...]:
        """TP, PP, CP, EP and ETP: what decides the process groups."""
        return self.tensor, self.pipeline, self.context, self.expert, self.expert_tensor

    @cached_property
    def still(self) -> "Layout":
        """The same with one sample at a time: weights and gradients do not depend on it."""
        return replace(self, micro_batch=1)

    @cached_property
    def data(self) -> int:
        """Data-parallel processes (DP)."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @cached_property
    def shards(self) -> int:
        """Processes with the same parameters that are no experts' (DP x CP)."""
        return self.data * self.context

    @cached_property
    def expert_shards(self) -> int:
        """Processes with the same experts."""
        return self.world // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def sequence(self) -> bool:
        """Whether activations between matrices are split along the sequence."""
        return self.tensor > 1

    def tokens(self, work: Work) -> int:
        """Of one microbatch on one process, before they are split along the sequence."""
        return work.sequence // self.context * self.micro_batch

    def microbatches(self, work: Work) -> int:
        """Per step and pipeline."""
        return work.batch // (self.micro_batch * self.data)

    def parallel(self) -> ParallelConfig:
        """The same as `flexolmo train` takes it."""
        return ParallelConfig(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual,
            context=self.context,
            expert=self.expert,
            expert_tensor=self.expert_tensor if self.expert_tensor != self.tensor else None,
            sequence=self.sequence,
        )

    def problem(self, work: Work) -> str | None:
        """Why this cannot run, or None."""
        for problem in process_problems(self.parallel(), self.world):
            return problem
        if work.batch % (self.micro_batch * self.data):
            return (
                f"global_batch_size = {work.batch} is no multiple of micro_batch_size = {self.micro_batch} times "
                f"{self.data} data-parallel processes"
            )
        return layout_problem(
            work.model,
            work.kind,
            self.parallel(),
            world_size=self.world,
            seq_length=work.sequence,
            microbatches=self.microbatches(work),
            anchor_ffn_hidden_size=work.anchor_ffn if work.kind == "pair" else None,
        )


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers on one pipeline process."""

    first: int
    """Index of its first layer in the model."""
    layers: int
    embedding: bool
    """Whether the embedding is here."""
    head: bool
    """Whether the final norm and the output layer are here."""


def chunks(work: Work, layout: Layout, stage: int) -> list[Chunk]:
    """Return what pipeline process ``stage`` holds, as Megatron assigns layers: one chunk, or ``virtual`` of them."""
    size = work.model.num_layers // (layout.pipeline * layout.virtual)
    places = [virtual * layout.pipeline + stage for virtual in range(layout.virtual)]
    last = layout.pipeline * layout.virtual - 1
    return [Chunk(place * size, size, place == 0, place == last) for place in places]


def alike(work: Work, layout: Layout, stage: int) -> list[tuple[Chunk, int]]:
    """Return the chunks of ``chunks`` with the number of those like it: all but the model's first and last are."""
    held = chunks(work, layout, stage)
    plain = [chunk for chunk in held if not chunk.embedding and not chunk.head]
    special = [(chunk, 1) for chunk in held if chunk.embedding or chunk.head]
    return special + ([(plain[0], len(plain))] if plain else [])


def reached(work: Work, chunk: Chunk) -> bool:
    """Whether the input of a chunk's first layer needs a gradient: there is something to train below.

    Every layer has something to train, so that only the model's first layer may do without.
    """
    return chunk.first > 0 or work.all_train


@cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(value for value in range(1, number + 1) if number % value == 0)


def layouts(work: Work, world: int, gpus_per_node: int, pinned: Mapping[str, int] = MappingProxyType({})) \
        -> Iterator[Layout]:
    """Yield every layout that can run; tensor-parallel processes stay within a node.

    A micro batch is a power of two up to 8. Distributed optimizer wherever there is something to share: it needs less
    memory and sends less than without. Left out is context parallelism of the local modules, which are for processors.

    Args:
        work: the run.
        world: number of processes.
        gpus_per_node: of the cluster.
        pinned: values of ``Layout``'s fields that are given.
    """

    def tried(field: str, usual: Iterable[int]) -> Iterable[int]:
        return (pinned[field],) if field in pinned else usual

    expert_sizes = _divisors(math.gcd(work.model.num_experts, world)) if work.kind == "moe" else (1,)
    contexts = (1, 2, 4, 8) if work.backend == "te" else (1,)
    for tensor in tried("tensor", _divisors(math.gcd(world, gpus_per_node))):
        for pipeline in tried("pipeline", _divisors(math.gcd(work.model.num_layers, world))):
            virtuals = _divisors(max(1, work.model.num_layers // pipeline)) if pipeline > 1 else (1,)
            for context in tried("context", contexts):
                for expert in tried("expert", expert_sizes):
                    # Megatron sums the gradients of replicated experts over the right processes only with EP.
                    for expert_tensor in tried("expert_tensor", {tensor, 1} if expert > 1 else {tensor}):
                        whole = Layout(world, tensor, pipeline, 1, context, expert, expert_tensor)
                        if whole.problem(work):
                            continue
                        shares = max(whole.shards, whole.expert_shards) > 1
                        for virtual in tried("virtual", virtuals):
                            for micro_batch in tried("micro_batch", (1, 2, 4, 8)):
                                distributed = bool(pinned.get("distributed", shares))
                                layout = replace(whole, virtual=virtual, micro_batch=micro_batch,
                                                 distributed=distributed)  # fmt: skip
                                if layout.problem(work) is None:
                                    yield layout
