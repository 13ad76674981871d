"""The table over all seeds, in the layout of the paper's table 1: methods as rows, domains as columns, their average.

Lower is better throughout: bits per byte. The spread is the sample standard deviation over seeds.
"""

import csv
import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.markdown import number_table, table_row

AVERAGE = "average"
MERGED = ("FlexOlmo", "FlexOlmo tuned")
GROUPS = {"methods": "Methods", "ablations": "Ablations", "active experts": "Active experts", "opt-outs": "Opt-outs"}


@dataclass
class Row:
    """One method."""

    about: dict[str, Any]
    """name, group, family, definition, source, sees, inference, training, training_tokens, training_flops."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """By column, the bits per byte of each seed."""

    @property
    def name(self) -> str:
        return self.about["name"]

    def mean(self, column: str) -> float:
        return statistics.fmean(self.values[column])

    def spread(self, column: str) -> float | None:
        """None for a single seed."""
        return statistics.stdev(self.values[column]) if len(self.values[column]) > 1 else None


@dataclass
class Table:
    """All methods on all domains."""

    seeds: list[int]
    columns: list[str]
    """Domains, their average, and after it other texts."""
    rows: list[Row]
    same: list[str] = field(default_factory=list)
    """Ablations that change nothing, and have no row."""

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def best(self, group: str, column: str) -> str:
        """The method with the fewest bits per byte in a column of a group, of those that see nothing of the future."""
        rows = [row for row in self.rows if row.about["group"] == group]
        fair = [row for row in rows if row.about["sees"] == "causal"] or rows
        return min(fair, key=lambda row: row.mean(column)).name

    def best_single(self, column: str) -> str | None:
        """The best of the public model, dense models and pairs in a column; None where there are none."""
        rows = [row for row in self.rows if re.fullmatch(r"public|(dense|pair) .*", row.name)]
        return min(rows, key=lambda row: row.mean(column)).name if rows else None

    def change(self, row: Row, column: str) -> float:
        """Difference of a method from the best single model, in % of it; below zero for fewer bits."""
        return 100 * (row.mean(column) / self.row(self.best_single(column)).mean(column) - 1)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {"seeds": self.seeds, "columns": self.columns, "methods": [
            {**row.about, "bits_per_byte": {column: {"mean": row.mean(column), "spread": row.spread(column),
                                                     "seeds": row.values[column]} for column in self.columns}}
            for row in self.rows]}

    def to_csv(self) -> str:
        """One line per method and column, for a data frame."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "group", "sees", "domain", "bits_per_byte", "spread", "training_tokens",
                         "training_flops", *(f"seed_{seed}" for seed in self.seeds)])
        for row in self.rows:
            about = row.about
            for column in self.columns:
                writer.writerow([row.name, about["group"], about["sees"], column, row.mean(column), row.spread(column),
                                 about["training_tokens"], about["training_flops"], *row.values[column]])
        return file.getvalue()

    def to_markdown(self) -> str:
        """A table for each group of methods, then what each method is."""
        parts = []
        for group, title in GROUPS.items():
            rows = [row for row in self.rows if row.about["group"] == group]
            if rows:
                lines = number_table(["method", *self.columns, "training tokens", "training FLOPs"],
                                     (self.cells(row, "**") for row in rows))
                parts.append(f"## {title}\n\n" + "\n".join(lines))
        merged = [row for name in MERGED if (row := self.row(name))]
        if merged and self.best_single(AVERAGE):
            changes = [[row.name, *(f"{self.change(row, column):+.1f} %" for column in self.columns)]
                       for row in merged]
            best = ["best single model", *(self.best_single(column) for column in self.columns)]
            lines = number_table(["method", *self.columns], [*changes, best])
            parts.insert(1, "## Does merging pay?\n\nChange of the bits per byte from the best single model: public, "
                            "dense or pair. Below zero is better.\n\n" + "\n".join(lines))
        seeds = ", ".join(map(str, self.seeds))
        note = (f"Bits per byte, lower is better; mean{' ± standard deviation' if len(self.seeds) > 1 else ''} over "
                f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)} ({seeds}). In bold the best of each column; † "
                "has seen the text that it predicts, and is never the best. Tokens and FLOPs are those of all training "
                "runs behind a method, the public anchor's included.")
        note += f"\n\n{same_note(self.same)}" * bool(self.same)
        about = [table_row(["method", "definition", "training runs", "a token costs", "source"]),
                 "|---|---|---|---|---|"]
        keys = ("definition", "training", "inference", "source")
        about += [table_row([row.name, *(str(row.about[key]) for key in keys)]) for row in self.rows]
        return "\n\n".join([*parts, note, "## What they are\n\n" + "\n".join(about)]) + "\n"

    def cells(self, row: Row, bold: str = "") -> list[str]:
        """Name, numbers and budget of a row, as text; what is best in its column is between two ``bold``."""
        numbers = []
        for column in self.columns:
            spread = row.spread(column)
            text = f"{row.mean(column):.3f}" + ("" if spread is None else f" ± {spread:.3f}")
            numbers.append(f"{bold}{text}{bold}" if self.best(row.about["group"], column) == row.name else text)
        mark = " †" if row.about["sees"] == "oracle" else ""
        return [row.name + mark, *numbers, f"{row.about['training_tokens'] / 1e6:,.2f} M",
                f"{row.about['training_flops']:.2e}"]


def same_note(names: Sequence[str]) -> str:
    """Say which ablations there is no row for, and why."""
    return f"The same as FlexOlmo in this setting, so not trained again: {', '.join(map(repr, names))}."


def build_table(scores: Sequence[dict[str, Any]], domains: Sequence[str], same: Sequence[str] = ()) -> Table:
    """Return the table over all seeds.

    Args:
        scores: of each seed, what ``scores.json`` holds.
        domains: that the average is over; what else was measured comes after it.
        same: ablations that change nothing.

    Raises:
        FlexOlmoError: the seeds were not evaluated alike.
    """
    names = [method["name"] for method in scores[0]["methods"]]
    for one in scores[1:]:
        if [method["name"] for method in one["methods"]] != names:
            raise FlexOlmoError(f"seeds {scores[0]['seed']} and {one['seed']} were evaluated with other methods: "
                                "evaluate both again")
    others = [name for name in scores[0]["methods"][0]["scores"] if name not in domains]
    columns = [*domains, AVERAGE, *others]
    rows = []
    for number, method in enumerate(scores[0]["methods"]):
        row = Row({key: value for key, value in method.items() if key != "scores"})
        for one in scores:
            found = {name: value["bits_per_byte"] for name, value in one["methods"][number]["scores"].items()}
            found[AVERAGE] = statistics.fmean(found[domain] for domain in domains)
            for column in columns:
                row.values.setdefault(column, []).append(found[column])
        rows.append(row)
    return Table([one["seed"] for one in scores], columns, rows, list(same))
