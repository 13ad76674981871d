"""The folder ``report``: the table as Markdown, CSV and JSON, and the pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_megatron.compare.figures import draw
from flexolmo_megatron.compare.scores import SCORES
from flexolmo_megatron.compare.steps import RECORD
from flexolmo_megatron.compare.table import Table, build_table
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file, read_json, write_json

if TYPE_CHECKING:
    from flexolmo_megatron.compare.plan import Comparison

TABLE = "table"
"""Name of the files without their suffixes."""


def write_report(comparison: "Comparison", folder: Path) -> None:
    """Write table.md, table.csv, table.json and the pictures into ``folder``.

    Raises:
        FlexOlmoError: the scores of a seed are missing, or a file cannot be written.
    """
    scores = _read_scores(comparison)
    table = _build(comparison, scores)
    write_json(folder / f"{TABLE}.json", table.to_json())
    for suffix, text in (("csv", table.to_csv()), ("md", table.to_markdown())):
        with atomic_file(folder / f"{TABLE}.{suffix}") as file:
            file.write(text.encode("utf-8"))
    draw(table, [one["routing"] for one in scores], list(comparison.config.owners), folder)


def read_table(comparison: "Comparison") -> Table:
    """Return the table that is in the folder ``report``."""
    return _build(comparison, _read_scores(comparison))


def _build(comparison: "Comparison", scores: list[dict[str, Any]]) -> Table:
    return build_table(scores, list(comparison.config.domains), comparison.same)


def _read_scores(comparison: "Comparison") -> list[dict[str, Any]]:
    scores = []
    for step in comparison.scores.values():
        folder = comparison.plan.out / step
        try:
            scores.append(read_json(folder / SCORES, "the scores of a seed"))
        except FlexOlmoError as error:
            raise FlexOlmoError(f"{error}; remove {folder / RECORD} to evaluate this seed again") from None
    return scores
