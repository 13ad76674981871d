"""``flexolmo plan``: the layouts of a run that fit on the GPUs, with their memory, traffic and estimated time.

Memory is counted (plan_state, plan_activations); times are estimates from a GPU's data sheet and an assumed share of
its peak, never measurements. Everything here is arithmetic: no model is built and no GPU is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.launch.plan_activations import Activations, peak_activations
from flexolmo_megatron.launch.plan_compute import chunk_flops
from flexolmo_megatron.launch.plan_hardware import GB, Hardware
from flexolmo_megatron.launch.plan_state import State, state
from flexolmo_megatron.launch.plan_traffic import Traffic, microbatch_traffic, optimizer_seconds, step_traffic
from flexolmo_megatron.launch.plan_work import Layout, Work, alike, chunks, layouts


@dataclass(frozen=True)
class Stage:
    """Memory of one pipeline process, in bytes."""

    stage: int
    state: State
    activations: Activations

    @property
    def total(self) -> int:
        return self.state.total + self.activations.total


@dataclass(frozen=True)
class Estimate:
    """One layout: memory counted, times estimated."""

    layout: Layout
    stages: tuple[Stage, ...]
    """First, second and last pipeline process (fewer where there are fewer): the others need no more than the
    second."""
    microbatches: int
    compute_seconds: float
    """Matrix products of all microbatches on the slowest pipeline process."""
    bubble_seconds: float
    """Time in which that process waits for the pipeline to fill and to drain."""
    traffic_seconds: dict[str, float]
    """Of one step, by kind."""
    sent: dict[str, float]
    """Bytes that one process sends per step, by kind."""
    optimizer_seconds: float
    needed_seconds: float
    """Of the step's needed FLOPs alone, on all GPUs at their peak."""
    tokens: int
    """Per step."""

    @property
    def worst(self) -> Stage:
        """The pipeline process that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def seconds(self) -> float:
        """Of one step."""
        return self.compute_seconds + self.bubble_seconds + sum(self.traffic_seconds.values()) + self.optimizer_seconds

    @property
    def peak_share(self) -> float:
        """Needed FLOPs per second over all GPUs as a share of their peak (MFU)."""
        return self.needed_seconds / self.seconds

    @property
    def bubble_share(self) -> float:
        """Part of the pipeline's time, without the step's end, in which a process waits."""
        busy = self.seconds - self.optimizer_seconds - self.traffic_seconds["data"]
        return self.bubble_seconds / busy

    def days(self, tokens: float) -> float:
        """Of training on ``tokens`` tokens."""
        return tokens / self.tokens * self.seconds / 86_400


def memory(work: Work, layout: Layout) -> tuple[Stage, ...]:
    """Count the memory of the first, second and last pipeline process."""
    places = sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})
    return tuple(Stage(at, state(work, layout, at), peak_activations(work, layout, at)) for at in places)


def estimate(work: Work, layout: Layout, hardware: Hardware, stages: tuple[Stage, ...]) -> Estimate:
    """Estimate the time of a step of a layout whose memory has been counted."""
    microbatches = layout.microbatches(work)

    def seconds(costs: tuple[float, Traffic]) -> float:
        return costs[0] / hardware.flops + sum(costs[1].seconds.values())

    slowest = max((_microbatch(work, layout, hardware, stage.stage) for stage in stages), key=seconds)
    flops, traffic = slowest
    ends = [step_traffic(work, layout, stage.state, hardware) for stage in stages]
    end = max(ends, key=lambda end: end.seconds["data"])
    return Estimate(
        layout=layout,
        stages=stages,
        microbatches=microbatches,
        compute_seconds=microbatches * flops / hardware.flops,
        bubble_seconds=(layout.pipeline - 1) / layout.virtual * seconds(slowest),
        traffic_seconds={kind: microbatches * value for kind, value in traffic.seconds.items()} | end.seconds,
        sent={kind: microbatches * value for kind, value in traffic.sent.items()} | end.sent,
        optimizer_seconds=max(optimizer_seconds(stage.state, work, hardware) for stage in stages),
        needed_seconds=_needed_flops(work) / (layout.world * hardware.peak_tflops * 1e12),
        tokens=work.tokens,
    )


def _microbatch(work: Work, layout: Layout, hardware: Hardware, stage: int) -> tuple[float, Traffic]:
    """What one microbatch costs a pipeline process: FLOPs and traffic."""
    flops = sum(n * chunk_flops(work, layout, chunk) for chunk, n in alike(work, layout, stage))
    return flops, microbatch_traffic(work, layout, stage, hardware)


@cache
def _needed_flops(work: Work) -> float:
    """FLOPs of one step on however many GPUs."""
    alone = Layout(1)
    return work.batch * sum(chunk_flops(work, alone, chunk) for chunk in chunks(work, alone, 0))


def plan(
    work: Work, hardware: Hardware, gpus: int, memory_limit: float, pinned: Mapping[str, int] = MappingProxyType({})
) -> list[Estimate]:
    """Return the layouts that fit, fastest first: of each TP x PP x EP x CP the fastest settings of the rest.

    Args:
        work: the run; not inference, for which see ``plan_inference``.
        hardware: of the cluster.
        gpus: number of processes.
        memory_limit: bytes that a process may hold.
        pinned: values of ``Layout``'s fields that are given.

    Raises:
        FlexOlmoError: no layout can run, or none fits; the message says what the smallest would need.
    """
    best: dict[tuple[int, ...], Estimate] = {}
    smallest: tuple[int, Layout] | None = None
    for layout in layouts(work, gpus, hardware.gpus_per_node, pinned):
        stages = memory(work, layout)
        needed = max(stage.total for stage in stages)
        if smallest is None or needed < smallest[0]:
            smallest = (needed, layout)
        if needed <= memory_limit:
            candidate = estimate(work, layout, hardware, stages)
            if layout.groups not in best or candidate.seconds < best[layout.groups].seconds:
                best[layout.groups] = candidate
    if smallest is None and pinned and (problem := Layout(gpus, **pinned).problem(work)):
        raise FlexOlmoError(f"the given layout cannot run on {gpus} GPUs: {problem}")
    if smallest is None:
        raise FlexOlmoError(
            f"no layout of {gpus} GPUs can run this: expected a number of GPUs that divides global_batch_size = "
            f"{work.batch}, alone or after tensor, pipeline or context parallelism took a part of it"
        )
    if not best:
        raise FlexOlmoError(
            f"no layout of {gpus} GPUs fits: the smallest ({describe(smallest[1])}) needs "
            f"{smallest[0] / GB:.1f} GB per GPU, of which {memory_limit / GB:.1f} GB are free"
        )
    return sorted(best.values(), key=lambda candidate: candidate.seconds)


def describe(layout: Layout) -> str:
    """A layout in one line."""
    parts = [f"TP {layout.tensor}", f"PP {layout.pipeline}"]
    if layout.virtual > 1:
        parts.append(f"VPP {layout.virtual}")
    if layout.expert > 1:
        parts.append(f"EP {layout.expert}")
    if layout.expert_tensor != layout.tensor:
        parts.append(f"ETP {layout.expert_tensor}")
    if layout.context > 1:
        parts.append(f"CP {layout.context}")
    parts += [f"DP {layout.data}", f"micro batch {layout.micro_batch}"]
    return " x ".join(parts)


def overrides(layout: Layout) -> Sequence[str]:
    """The options of `flexolmo train` that set a layout."""
    parallel = layout.parallel()
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    given = [f"parallel.{name}={getattr(parallel, name)}" for name in names if getattr(parallel, name) not in (1, None)]
    if layout.expert_tensor != layout.tensor and layout.expert_tensor == 1:
        given.append("parallel.expert_tensor=1")
    if layout.sequence:
        given.append("parallel.sequence=true")
    given.append(f"micro_batch_size={layout.micro_batch}")
    given.append(f"optimizer.use_distributed_optimizer={str(layout.distributed).lower()}")
    return given
