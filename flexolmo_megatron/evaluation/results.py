"""The table of models and domains: as JSON, CSV, Markdown, and for the terminal. Lower is better throughout."""

import csv
import io
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.evaluation.markdown import number_table
from flexolmo_megatron.evaluation.perplexity import DomainScore
from flexolmo_megatron.evaluation.routing import RoutingShare
from flexolmo_megatron.files import atomic_file, write_json

_CSV_COLUMNS = ("model", "domain", "bits_per_byte", "standard_error", "change_percent", "documents", "text_bytes",
                "tokens")


@dataclass
class Results:
    """What an evaluation found; every model has a score in every domain."""

    scores: dict[str, dict[str, DomainScore]]
    """By model, then by domain, both in the order to show."""
    reference: str | None = None
    """The model that the others are compared with."""
    routing: dict[str, dict[str, RoutingShare]] = field(default_factory=dict)
    """By model, then by domain; only models with experts, and only if it was asked for."""
    setup: dict[str, Any] = field(default_factory=dict)
    """How the numbers were made: paths, experts, files, limits. Stored with them."""

    def __post_init__(self) -> None:
        if self.reference is not None:
            check_reference(self.reference, self.models)

    @property
    def models(self) -> list[str]:
        return list(self.scores)

    @property
    def domains(self) -> list[str]:
        return list(next(iter(self.scores.values())))

    def bits_per_byte(self) -> dict[str, dict[str, float]]:
        """The bare numbers: `{model: {domain: bits per byte}}`."""
        return {model: {domain: score.bits_per_byte for domain, score in row.items()}
                for model, row in self.scores.items()}

    def change(self, model: str, domain: str) -> float | None:
        """Difference from the reference model in % of it, below zero for fewer bits; None for the reference itself."""
        if self.reference in (None, model):
            return None
        reference = self.scores[self.reference][domain].bits_per_byte
        return 100 * (self.scores[model][domain].bits_per_byte / reference - 1)

    def best(self, domain: str) -> str:
        """The model with the fewest bits per byte in ``domain``."""
        return min(self.scores, key=lambda model: self.scores[model][domain].bits_per_byte)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        def by_domain(value: Callable[[DomainScore], Any]) -> dict[str, dict[str, Any]]:
            return {model: {domain: value(score) for domain, score in row.items()}
                    for model, row in self.scores.items()}

        values: dict[str, Any] = {
            "bits_per_byte": self.bits_per_byte(),
            "standard_error": by_domain(lambda score: score.standard_error),
            "documents": by_domain(lambda score: score.documents),
            "text_bytes": by_domain(lambda score: score.text_bytes),
            "tokens": by_domain(lambda score: score.tokens),
            "reference": self.reference,
            "setup": self.setup,
        }
        if self.routing:
            values["routing_share"] = {model: {domain: asdict(share) for domain, share in row.items()}
                                       for model, row in self.routing.items()}
        return values

    def to_csv(self) -> str:
        """One line per model and domain, for a data frame."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)
        for model, row in self.scores.items():
            for domain, score in row.items():
                writer.writerow([model, domain, score.bits_per_byte, score.standard_error, self.change(model, domain),
                                 score.documents, score.text_bytes, score.tokens])
        return file.getvalue()

    def _cells(self, model: str, form: Callable[[str, str, bool], Any]) -> list[Any]:
        """What ``form`` makes of each domain's number, its change from the reference ("" if none), and being best."""
        cells = []
        for domain in self.domains:
            change = self.change(model, domain)
            cells.append(form(f"{self.scores[model][domain].bits_per_byte:.4f}",
                              "" if change is None else f"{change:+.1f} %", self.best(domain) == model))
        return cells

    def _caption(self, best: str) -> str:
        compared = f"; % is the change from {self.reference}" if self.reference is not None else ""
        return f"Bits per byte, lower is better; {best}{compared}."

    def to_markdown(self) -> str:
        """A table with a row per model and a column per domain."""
        def cell(number: str, change: str, best: bool) -> str:
            text = f"{number} ({change})" if change else number
            return f"**{text}**" if best else text

        lines = number_table(["model", *self.domains],
                             ([model, *self._cells(model, cell)] for model in self.models))
        return "\n".join([*lines, "", self._caption("the best of each column in bold"), ""])

    def to_rich(self) -> Table:
        """The same table for the terminal; the best of each column has a star, and is green where there is colour."""
        def cell(number: str, change: str, best: bool) -> Text:
            text = f"{'* ' if best else ''}{number}" + (f"\n{change}" if change else "")
            return Text(text, style="bold green" if best else "")

        table = Table(show_lines=True, caption=self._caption("* best of its column"), caption_justify="left")
        table.add_column("model")
        for domain in self.domains:
            table.add_column(Text(domain), justify="right", no_wrap=True)
        for model in self.models:
            table.add_row(Text(model), *self._cells(model, cell))
        return table

    def save(self, directory: str | os.PathLike) -> None:
        """Write results.json, results.csv and results.md into ``directory``, which exists.

        Raises:
            FlexOlmoError: a file cannot be written.
        """
        write_json(os.path.join(directory, "results.json"), self.to_json())
        for name, text in (("results.csv", self.to_csv()), ("results.md", self.to_markdown())):
            with atomic_file(os.path.join(directory, name)) as file:
                file.write(text.encode("utf-8"))


def check_reference(reference: str, models: list[str]) -> None:
    """Check that ``reference`` is one of ``models``.

    Raises:
        FlexOlmoError: it is not; the message lists them.
    """
    if reference not in models:
        raise FlexOlmoError(f"--reference {reference!r} is none of the models{nearest(reference, models)}: "
                            f"expected one of {', '.join(models)}")
