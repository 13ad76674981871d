"""Pictures of a comparison: routing by layer and domain, active experts against quality, opt-outs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_megatron.compare.table import AVERAGE, MERGED, Table
from flexolmo_megatron.evaluation.plots import plot_opt_out, plot_routing_share, saved_figure
from flexolmo_megatron.evaluation.routing import RoutingShare


def draw(table: Table, routing: Sequence[Mapping[str, Any]], owners: Sequence[str], folder: Path) -> None:
    """Write the pictures for which there are numbers: means over the seeds.

    Args:
        table: of all methods.
        routing: of each seed, by method and text set, the fields of a ``RoutingShare``.
        owners: names.
        folder: where to.
    """
    shares = {method: {name: _mean_share([one[method][name] for one in routing]) for name in routing[0][method]}
              for method in routing[0]}
    if shares:
        plot_routing_share(shares, folder / "routing_share.png")
    for method in MERGED:
        if table.row(method) is None:
            continue
        suffix = method.removeprefix("FlexOlmo").strip()
        suffix = f"_{suffix}" if suffix else ""
        _draw_active(table, method, folder / f"active_experts{suffix}.png")
        # With tuned rows, the strict guarantee is what people are promised.
        left = {owner: f"{method} without {owner}" + (" (strict)" if suffix else "") for owner in owners}
        if all(table.row(name) for name in left.values()) and table.row("public"):
            bits = {name: {column: table.row(name).mean(column) for column in ("public", *owners)}
                    for name in ("public", method, *left.values())}
            plot_opt_out(bits, folder / f"opt_out{suffix}.png", public="public", merged=method, opted_out=left)


def _mean_share(shares: Sequence[Mapping[str, Any]]) -> RoutingShare:
    weight, first = (np.mean([share[key] for share in shares], axis=0).tolist() for key in ("weight", "first_choice"))
    return RoutingShare(shares[0]["experts"], weight, first)


def _draw_active(table: Table, method: str, path: Path) -> None:
    """Lines of bits per byte over the number of active experts, one for each domain; bars are the spread."""
    found = {int(match[1]): row for row in table.rows
             if (match := re.fullmatch(rf"{re.escape(method)} top-(\d+)", row.name))}
    counts = sorted(found)
    if not counts:
        return
    with saved_figure(path, 1, 1, 6.5, 4.2) as (figure, axes):
        axis = axes[0, 0]
        for index, column in enumerate(table.columns):
            axis.errorbar(counts, [found[count].mean(column) for count in counts],
                          yerr=[found[count].spread(column) or 0 for count in counts], marker="o", capsize=3,
                          color=f"C{index}" if column != AVERAGE else "black",
                          linestyle="--" if column == AVERAGE else "-", label=column)
        axis.set_xticks(counts)
        axis.set_xlabel("active experts (top-k)")
        axis.set_ylabel("bits per byte (lower is better)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{method}: active experts and quality", fontsize=11)
        figure.legend(loc="outside right upper", title="domain", frameon=False, fontsize=9)
