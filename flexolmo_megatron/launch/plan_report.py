"""A plan as a table of 120 columns, as JSON and as a picture."""

import os
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from flexolmo_megatron.evaluation.plots import saved_figure
from flexolmo_megatron.launch.plan import Estimate, overrides
from flexolmo_megatron.launch.plan_hardware import GB, Hardware
from flexolmo_megatron.launch.plan_traffic import KINDS

_COLOURS = {  # Okabe and Ito, colour-blind-safe
    "weights": "#999999", "gradients": "#0072B2", "optimizer": "#E69F00", "activations": "#009E73",
    "compute": "#999999", "bubble": "#F0E442", "tensor": "#0072B2", "context": "#56B4E9", "expert": "#009E73",
    "pipeline": "#CC79A7", "data": "#D55E00",
}  # fmt: skip


def _memory(estimate: Estimate) -> dict[str, int]:
    worst = estimate.worst
    return {
        "weights": worst.state.weights,
        "gradients": worst.state.gradients,
        "optimizer": worst.state.optimizer,
        "activations": worst.activations.total,
    }


def plan_table(title: str) -> Table:
    """An empty table in the style of all plans."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), title=title, title_justify="left")


def layout_table(estimates: Sequence[Estimate], tokens: float, title: str) -> Table:
    """Layouts as rows, best first; memory of the pipeline process that needs the most."""
    table = plan_table(title)
    unit, size = ("GB", GB) if max(estimate.worst.total for estimate in estimates) >= GB else ("MB", GB / 1e3)
    splits = ("TP", "PP", "VPP", "EP", "ETP", "CP", "DP", "micro\nbatch")
    measures = *(f"{name}\n{unit}" for name in ("weights", "grads", "optim.", "activ.", "total", "sent")), "bubble\n%"
    for name in ("#", *splits, *measures, "step\ns", "MFU\n%", "days"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, estimate in enumerate(estimates, 1):
        layout, worst = estimate.layout, estimate.worst
        table.add_row(
            str(number),
            *(str(getattr(layout, name)) for name in ("tensor", "pipeline", "virtual", "expert", "expert_tensor")),
            str(layout.context),
            str(layout.data),
            str(layout.micro_batch),
            *(f"{value / size:.1f}" for value in _memory(estimate).values()),
            f"{worst.total / size:.1f}",
            f"{sum(estimate.sent.values()) / size:,.0f}",
            f"{100 * estimate.bubble_share:.1f}",
            f"{estimate.seconds:.2f}" if estimate.seconds >= 0.1 else f"{estimate.seconds:.1e}",
            f"{100 * estimate.peak_share:.0f}",
            _short(estimate.days(tokens)),
        )
    return table


def _short(days: float) -> str:
    if days < 0.1:
        return f"{days:.1e}"
    return f"{days:.1f}" if days < 100 else f"{days:,.0f}"


def traffic_table(estimate: Estimate) -> Table:
    """What one process of the best layout sends in a step."""
    table = plan_table("traffic per step of layout 1")
    for name in ("kind", "GB sent per GPU", "seconds"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, text in KINDS.items():
        table.add_row(text, f"{estimate.sent[kind] / GB:,.2f}", f"{estimate.traffic_seconds[kind]:.3f}")
    return table


def as_record(estimate: Estimate, tokens: float) -> dict[str, Any]:
    """One layout for JSON; sizes in bytes, times in seconds."""
    layout = estimate.layout
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual,
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
        "context": layout.context,
        "data": layout.data,
        "sequence": layout.sequence,
        "micro_batch_size": layout.micro_batch,
        "microbatches": estimate.microbatches,
        "use_distributed_optimizer": layout.distributed,
        "options": list(overrides(layout)),
        "stages": [
            {
                "stage": stage.stage,
                "trained_parameters": stage.state.trained,
                "frozen_parameters": stage.state.frozen,
                "weight_bytes": stage.state.weights,
                "gradient_bytes": stage.state.gradients,
                "optimizer_bytes": stage.state.optimizer,
                "activation_bytes": stage.activations.kept,
                "passing_bytes": stage.activations.passing,
                "total_bytes": stage.total,
            }
            for stage in estimate.stages
        ],
        "sent_bytes": estimate.sent,
        "estimated": {
            "compute_seconds": estimate.compute_seconds,
            "bubble_seconds": estimate.bubble_seconds,
            "bubble_share": estimate.bubble_share,
            "traffic_seconds": estimate.traffic_seconds,
            "optimizer_seconds": estimate.optimizer_seconds,
            "step_seconds": estimate.seconds,
            "share_of_peak": estimate.peak_share,
            "tokens_per_second": estimate.tokens / estimate.seconds,
            "days": estimate.days(tokens),
        },
    }


def draw(estimates: Sequence[Estimate], hardware: Hardware, limit: float, title: str, path: str | os.PathLike) -> None:
    """Draw memory per GPU and seconds per step of the layouts as stacked bars in a PNG file.

    Raises:
        FlexOlmoError: matplotlib is missing, or the file cannot be written.
    """
    names = [_label(number, estimate) for number, estimate in enumerate(estimates, 1)]
    with saved_figure(path, 1, 2, 11, 1.6 + 0.42 * len(estimates), sharey=True) as (figure, axes):
        memory, time = axes[0]
        _bars(memory, names, [{k: v / GB for k, v in _memory(e).items()} for e in estimates])
        memory.axvline(limit / GB, color="black", linestyle="--", linewidth=1, label="free on a GPU")
        memory.set_xlabel("GB on the GPU that needs the most (counted)")
        _bars(time, names, [_times(e) for e in estimates])
        time.set_xlabel(f"s per step (estimated at {100 * hardware.share:g} % of {hardware.peak_tflops:g} TFLOP/s)")
        for axis in (memory, time):
            axis.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
        memory.invert_yaxis()
        figure.suptitle(title, fontsize=10)


def _label(number: int, estimate: Estimate) -> str:
    layout = estimate.layout
    split = f"TP{layout.tensor} PP{layout.pipeline}" + (f"x{layout.virtual}" if layout.virtual > 1 else "")
    split += f" EP{layout.expert}" if layout.expert > 1 else ""
    split += f" CP{layout.context}" if layout.context > 1 else ""
    return f"{number}. {split} DP{layout.data}"


def _times(estimate: Estimate) -> dict[str, float]:
    times = {"compute": estimate.compute_seconds + estimate.optimizer_seconds, "bubble": estimate.bubble_seconds}
    return times | estimate.traffic_seconds


def _bars(axes: Any, names: list[str], rows: list[dict[str, float]]) -> None:
    left = [0.0] * len(rows)
    for part in rows[0]:
        values = [row[part] for row in rows]
        if any(values):
            axes.barh(names, values, left=left, color=_COLOURS[part], label=part, height=0.7)
        left = [begin + value for begin, value in zip(left, values, strict=True)]
