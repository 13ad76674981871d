"""The result of ``flexolmo bench gpu`` as tables."""

from typing import Any

from rich.console import Group
from rich.table import Table

from flexolmo_megatron.training.bench_gpu import Result
from flexolmo_megatron.training.bench_speed import Products


def render(result: Result) -> Group:
    """Tables for a terminal of 120 columns."""
    checks = Table("comparison with the local path in fp32", "error", "at most", "", title="the same weights")
    for check in result.checks:
        checks.add_row(check.what, f"{check.error:.2e}", f"{check.tolerance:.2e}", "ok" if check.passed else "FAILED")
    parts: list[Any] = [checks, _products_line(result.products)]
    where = result.chip.name or "the CPU, tiny sizes: these speeds say nothing about a GPU"
    size = f"hidden {result.sizes.hidden}, FFN {result.sizes.ffn}"
    titles = {
        "pair": f"step of an owner's run, {result.layers} layers, {size}",
        "layer": f"merged FFN layer, forward and backward, {result.sizes.experts} experts, top-{result.sizes.top_k}",
        "grouped": "the experts' first matrix, forward",
    }
    for name, title in titles.items():
        table = Table(where, "ms", "tokens/s", "TFLOP/s", "of bf16 peak", "peak memory, GB", title=title)
        for speed in getattr(result, name):
            share = result.share(speed)
            table.add_row(
                speed.what,
                f"{speed.seconds * 1e3:,.2f}",
                f"{speed.tokens_per_second:,.0f}",
                f"{speed.tflops:,.3g}",
                "" if share is None else f"{share:.1%}",
                "" if speed.peak_bytes is None else f"{speed.peak_bytes / 1e9:.1f}",
            )
        parts.append(table)
    parts.append("matrix product's peak, TFLOP/s: " + ", ".join(f"{k} {v:,.3g}" for k, v in result.peak.items()))
    targets = Table("target on one H200", "wanted", "measured", "", title="targets")
    for target in result.targets():
        measured = "" if target.measured is None else f"{target.measured:.2f}"
        verdict = {True: "met", False: "missed", None: "not measured"}[target.met]
        targets.add_row(target.what, f"{target.wanted:.2f}", measured, verdict)
    return Group(*parts, targets)


def _products_line(products: Products) -> str:
    verdict = "as needed" if products.passed else "NOT as needed"
    return (
        f"matrix products launched in one pair step: {products.launched}, {verdict}: {products.needed} and "
        f"{products.extra} that upstream adds; with weight gradients of frozen weights there would be "
        f"{products.frozen} more"
    )
