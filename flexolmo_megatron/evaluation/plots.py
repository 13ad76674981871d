"""Pictures of an evaluation and of training runs, as PNG files.

Colours are those of Okabe and Ito (colour-blind-safe); where there are more bars than colours, hatches tell them apart.
matplotlib is loaded when a picture is drawn, with its file-only back end: no display is needed.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flexolmo_megatron.evaluation.routing import RoutingShare

# The anchor is always grey, so the other experts start with the palette's strongest.
_GREY = "#999999"
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")

_METRICS = (("loss", "loss (nats per token)"), ("lr", "learning rate"), ("grad_norm", "gradient norm"),
            ("tokens_per_second", "tokens per second"))


@contextmanager
def saved_figure(path: str | os.PathLike, rows: int, columns: int, width: float, height: float,
                 **options: Any) -> Iterator[tuple["Figure", Any]]:
    """Give a figure of ``width`` x ``height`` inches and its axes `[rows, columns]`; then write it to ``path`` as PNG.

    Args:
        path: of the file.
        rows: of axes.
        columns: of axes.
        width: inches.
        height: inches.
        options: further ones of matplotlib's ``subplots``.

    Raises:
        FlexOlmoError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise FlexOlmoError("pictures need matplotlib; install it with: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure, figure.subplots(rows, columns, squeeze=False, **options)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def bar_style(index: int) -> dict[str, str]:
    """Fill of the bars of expert or model ``index``: grey for the first, then a colour each, hatched if repeated."""
    if index == 0:
        return {"color": _GREY}
    lap, colour = divmod(index - 1, len(_COLOURS))
    return {"color": _COLOURS[colour], "hatch": _HATCHES[lap % len(_HATCHES)], "edgecolor": "white", "linewidth": 0}


def plot_bits_per_byte(bits_per_byte: Mapping[str, Mapping[str, float]], path: str | os.PathLike,
                       reference: str | None = None) -> None:
    """Draw the matrix of models x domains as a heat map with the numbers in it.

    Domains differ in difficulty by more than models do, so the colour compares within a column: with the reference
    model if there is one, otherwise with the column's best.

    Args:
        bits_per_byte: by model, then by domain.
        path: of the PNG file.
        reference: a model.
    """
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm

    models, domains = list(bits_per_byte), list(next(iter(bits_per_byte.values())))
    values = np.array([[bits_per_byte[model][domain] for domain in domains] for model in models])
    base = values[models.index(reference)] if reference is not None else values.min(axis=0)
    change = 100 * (values / base - 1)
    largest = max(float(np.abs(change).max()), 1.0)  # so that rounding shows no colour
    if reference is not None:
        colours: dict[str, Any] = {"cmap": "PuOr", "norm": TwoSlopeNorm(0, -largest, largest)}
        label = f"change from {reference} (%)"
    else:
        colours = {"cmap": "Blues", "vmin": 0, "vmax": largest}
        label = "above the best of the column (%)"
    longest = max(map(len, models))
    width = 2.2 + 0.075 * longest + max(1.15, 0.09 * max(map(len, domains))) * len(domains)
    with saved_figure(path, 1, 1, max(6.5, width), max(3.2, 1.5 + 0.55 * len(models))) as (figure, axes):
        axis: Axes = axes[0, 0]
        image = axis.imshow(change, aspect="auto", **colours)
        for row, column in np.ndindex(values.shape):
            red, green, blue, _ = image.cmap(image.norm(change[row, column]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            best = values[row, column] == values[:, column].min()
            text = f"{values[row, column]:.3f}"
            if models[row] != reference:
                text += f"\n{change[row, column]:+.1f} %"
            axis.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black",
                      fontweight="bold" if best else "normal")
        axis.set_xticks(range(len(domains)), domains)
        axis.set_yticks(range(len(models)), models)
        axis.set_xlabel("domain")
        axis.set_ylabel("model")
        axis.tick_params(length=0)
        axis.set_xticks(np.arange(len(domains) - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(len(models) - 1) + 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1.5)
        axis.tick_params(which="minor", length=0)
        axis.spines[:].set_visible(False)
        figure.colorbar(image, ax=axis, label=label)
        figure.suptitle("Bits per byte (lower is better, best of each domain in bold)", fontsize=11)


def plot_routing_share(routing: "Mapping[str, Mapping[str, RoutingShare]]", path: str | os.PathLike) -> None:
    """Draw the share of routing weight by layer, a chart per model (row) and domain (column); figure 2 of the paper.

    Args:
        routing: by model, then by domain.
        path: of the PNG file.
    """
    models, domains = list(routing), list(next(iter(routing.values())))
    experts = list(dict.fromkeys(name for row in routing.values() for share in row.values() for name in share.experts))
    layers = max(len(share.weight) for row in routing.values() for share in row.values())
    width = max(1.6, 0.1 * layers) * len(domains) + 1.8
    height = 1.75 * len(models) + 1.1
    with saved_figure(path, len(models), len(domains), width, height, sharex=True, sharey=True) as (figure, axes):
        shown: dict[str, Any] = {}
        for row, model in enumerate(models):
            for column, domain in enumerate(domains):
                axis: Axes = axes[row, column]
                share = routing[model][domain]
                bottom = [0.0] * len(share.weight)
                for index, name in enumerate(share.experts):
                    heights = [100 * layer[index] for layer in share.weight]
                    bars = axis.bar(range(len(heights)), heights, bottom=bottom, width=0.85,
                                    **bar_style(experts.index(name)))
                    shown.setdefault(name, bars)
                    bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
                axis.set_ylim(0, 100)
                axis.set_xlim(-0.6, layers - 0.4)
                step = max(1, layers // 8)
                axis.set_xticks(range(0, layers, step))
                if row == 0:
                    axis.set_title(domain, fontsize=10)
                if column == 0:
                    axis.set_ylabel(model, fontsize=9)
                axis.spines[["top", "right"]].set_visible(False)
        figure.supxlabel("layer", fontsize=10)
        figure.supylabel("share of routing weight (%)", fontsize=10)
        figure.suptitle("Which experts are used, by layer and domain", fontsize=11)
        figure.legend(shown.values(), shown.keys(), loc="outside right upper", title="expert", frameon=False,
                      fontsize=9)


def plot_opt_out(bits_per_byte: Mapping[str, Mapping[str, float]], path: str | os.PathLike, *, public: str, merged: str,
                 opted_out: Mapping[str, str]) -> None:
    """Draw what happens to every domain when an owner opts out: bars of the public, the merged and each reduced model.

    The bar of a domain under the model that its own owner has left is framed.

    Args:
        bits_per_byte: by model, then by domain.
        path: of the PNG file.
        public: the model without any owner's expert.
        merged: the model with all of them.
        opted_out: by domain, the model without that domain's owner.
    """
    models = [public, merged, *opted_out.values()]
    domains = list(bits_per_byte[merged])
    width = 0.85 / len(models)
    with saved_figure(path, 1, 1, 2.8 + 0.42 * len(models) * len(domains), 4.2) as (figure, axes):
        axis: Axes = axes[0, 0]
        for index, model in enumerate(models):
            left = [column + (index - (len(models) - 1) / 2) * width for column in range(len(domains))]
            heights = [bits_per_byte[model][domain] for domain in domains]
            bars = axis.bar(left, heights, width=0.92 * width, label=model, **bar_style(index))
            axis.bar_label(bars, [f"{value:.2f}" for value in heights], fontsize=7, padding=2)
            for domain, bar in zip(domains, bars, strict=True):
                if opted_out.get(domain) == model:
                    bar.set(edgecolor="black", linewidth=1.8)
        axis.set_xticks(range(len(domains)), domains)
        axis.set_xlabel("domain (framed: its own owner has opted out)")
        axis.set_ylabel("bits per byte (lower is better)")
        axis.margins(y=0.1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title("What opting out changes", fontsize=11)
        figure.legend(loc="outside right upper", title="model", frameon=False, fontsize=9)


def plot_curves(runs: Mapping[str, Mapping[int, Mapping[str, float]]], path: str | os.PathLike) -> None:
    """Draw loss (and validation loss), learning rate, gradient norm and speed of training runs over their steps.

    Args:
        runs: by name, what ``read_metrics`` returns.
        path: of the PNG file.

    Raises:
        FlexOlmoError: the runs hold none of these metrics.
    """
    metrics = [(key, label) for key, label in _METRICS
               if any(_series(steps, key)[0] for steps in runs.values())]
    if not metrics:
        raise FlexOlmoError(f"{', '.join(runs)}: no metric to draw; expected some of "
                            f"{', '.join(key for key, _ in _METRICS)}")
    rows = (len(metrics) + 1) // 2
    with saved_figure(path, rows, 2, 11, 0.8 + 2.7 * rows) as (figure, axes):
        handles: dict[str, Any] = {}
        for axis, (key, label) in zip(axes.flat, metrics, strict=False):
            for index, (name, steps) in enumerate(runs.items()):
                colour = _COLOURS[index % len(_COLOURS)]
                style = ("-", "--", ":", "-.")[index // len(_COLOURS) % 4]
                (handles[name],) = axis.plot(*_series(steps, key), style, color=colour, linewidth=1.2)
                if key == "loss" and (valid := _series(steps, "valid_loss"))[0]:
                    axis.plot(*valid, color=colour, marker="o", markersize=5, markerfacecolor="white", linewidth=0.8)
                    (handles["validation"],) = axis.plot([], [], color="black", marker="o", markerfacecolor="white")
            axis.set_xlabel("step")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes.flat[len(metrics):]:
            axis.set_visible(False)
        figure.suptitle("Training", fontsize=11)
        handles = {**{name: line for name, line in handles.items() if name in runs}, **handles}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def plot_scores(histogram: Mapping[str, Sequence[float]], path: str | os.PathLike) -> None:
    """Draw how a proxy classifier's scores of public documents, of the proxies among them and of the owner's spread.

    Args:
        histogram: the edges of the bins, and for ``public``, ``proxies`` and ``owner_held_out`` the number of documents
            in each.
        path: of the PNG file.
    """
    edges = histogram["edges"]
    labels = {"public": "public", "proxies": "proxies, of the public ones", "owner_held_out": "owner's, held out"}
    with saved_figure(path, 1, 1, 7.5, 4) as (figure, axes):
        axis: Axes = axes[0, 0]
        for key, colour in zip(labels, (_GREY, _COLOURS[0], _COLOURS[1]), strict=True):
            axis.stairs(histogram[key], edges, fill=key != "owner_held_out", color=colour, label=labels[key],
                        linewidth=2, alpha=0.9)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7)
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel("score: log-odds of being the owner's (more extreme ones are in the outermost bins)")
        axis.set_ylabel("documents")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title("What the proxy classifier says of documents", fontsize=11)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def plot_domains(positions: Mapping[str, Sequence[float]], shares: tuple[float, float],
                 path: str | os.PathLike) -> None:
    """Draw where domain vectors lie relative to each other.

    Args:
        positions: x and y of each domain.
        shares: of the variance along both axes.
        path: of the PNG file.
    """
    with saved_figure(path, 1, 1, 6.5, 5.5) as (_, axes):
        axis: Axes = axes[0, 0]
        for index, (name, (x, y)) in enumerate(positions.items()):
            axis.scatter([x], [y], s=70, color=_COLOURS[index % len(_COLOURS)], zorder=2)
            axis.annotate(name, (x, y), xytext=(7, 5), textcoords="offset points", fontsize=9)
        axis.set_aspect("equal", adjustable="datalim")
        axis.margins(0.2)
        axis.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of the variance)")
        axis.set_ylabel(f"second principal component ({100 * shares[1]:.0f} %)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title("Domain vectors, as rows of norm 1", fontsize=11)


def _series(steps: Mapping[int, Mapping[str, float]], key: str) -> tuple[Sequence[int], Sequence[float]]:
    found = {step: record[key] for step, record in steps.items() if record.get(key) is not None}
    return list(found), list(found.values())
