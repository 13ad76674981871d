"""The list of all steps, for ``--dry-run``."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flexolmo_megatron.compare.plan import Comparison
from flexolmo_megatron.compare.table import same_note


def list_steps(comparison: Comparison, names: Sequence[str]) -> Group:
    """Return a table of steps, one of what a run of each kind costs, and which ablations change nothing.

    Raises:
        FlexOlmoError: a step was done with other options.
    """
    plan = comparison.plan
    steps = Table("step", "what", "tokens", "FLOPs", "done", title=f"steps of {plan.out}")
    for name in names:
        step = plan.steps[name]
        steps.add_row(name, step.what, *_budget(step.tokens, step.flops), "yes" if plan.is_done(name) else "")
    chosen = [plan.steps[name] for name in names]
    steps.add_row("all", "", *_budget(sum(step.tokens for step in chosen), sum(step.flops for step in chosen)), "")
    runs = Table("kind of run", "tokens", "FLOPs", title="budget of one run of each kind")
    for kind in comparison.flops:
        runs.add_row(kind, *_budget(comparison.tokens[kind], comparison.flops[kind]))
    for table in (steps, runs):
        for column in table.columns[-3 if table is steps else -2:]:
            column.justify = "right"
    return Group(steps, runs, *([Text(same_note(comparison.same))] if comparison.same else []))


def _budget(tokens: int, flops: int) -> tuple[str, str]:
    return (f"{tokens:,}", f"{flops:.2e}") if tokens else ("", "")
