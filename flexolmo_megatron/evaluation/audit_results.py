"""What an extraction attack has found: rates with their confidence intervals, as a table, JSON and a picture."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_megatron.evaluation.markdown import number_table
from flexolmo_megatron.evaluation.plots import bar_style, saved_figure
from flexolmo_megatron.files import atomic_file, write_json

_Z = 1.959963984540054
"""Of the standard normal distribution, for 95 % confidence."""


class Interval(NamedTuple):
    """A 95 % confidence interval of a rate, from 0 to 1."""

    low: float
    high: float


def wilson(successes: int, trials: int) -> Interval:
    """Return Wilson's score interval (JASA 22, 1927), which holds for rates near 0 and small numbers as well."""
    rate = successes / trials
    scale = 1 + _Z**2 / trials
    middle = (rate + _Z**2 / (2 * trials)) / scale
    half = _Z / scale * math.sqrt(rate * (1 - rate) / trials + _Z**2 / (4 * trials**2))
    return Interval(0.0 if successes == 0 else middle - half, 1.0 if successes == trials else middle + half)


@dataclass(frozen=True)
class Similarity:
    """Of the best samples of one passage, from 0 to 1."""

    passage: float
    """Of the whole text, with the given prefix: the published measure."""
    continuation: float
    """Of what the model has added alone."""


@dataclass(frozen=True)
class Rate:
    """How much of a corpus a model gave away."""

    passages: int
    extracted: int
    """Passages with a sample that is similar enough."""
    verbatim: int
    """Passages with a continuation that is similar enough even without the prefix, which the attacker had."""
    mean_similarity: float
    """Of the passages' best samples."""

    @classmethod
    def of(cls, similarities: Sequence[Similarity], threshold: float) -> "Rate":
        """Count the passages whose similarity is ``threshold`` or more."""
        return cls(len(similarities), sum(similarity.passage >= threshold for similarity in similarities),
                   sum(similarity.continuation >= threshold for similarity in similarities),
                   math.fsum(similarity.passage for similarity in similarities) / len(similarities))

    @property
    def rate(self) -> float:
        return self.extracted / self.passages

    @property
    def interval(self) -> Interval:
        return wilson(self.extracted, self.passages)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} [{low:.1%}, {high:.1%}] {self.extracted}/{self.passages}"


@dataclass
class AuditResults:
    """Every model has a rate in every corpus."""

    rates: dict[str, dict[str, Rate]]
    """By model, then by corpus, both in the order to show."""
    setup: dict[str, Any] = field(default_factory=dict)
    """How the numbers were made. Stored with them."""
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    """By corpus, the number of unusable documents of each kind, where there are any."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {"extraction": {model: {corpus: {
            "rate": rate.rate, "interval_95": list(rate.interval), "passages": rate.passages,
            "extracted": rate.extracted, "extracted_without_prefix": rate.verbatim,
            "mean_similarity": rate.mean_similarity,
        } for corpus, rate in row.items()} for model, row in self.rates.items()}, "skipped": self.skipped,
            "setup": self.setup}

    def to_markdown(self) -> str:
        """A table with a row per model and a column per corpus; also what the terminal shows."""
        corpora = list(next(iter(self.rates.values())))
        lines = number_table(["extracted", *corpora],
                             ([model, *map(str, row.values())] for model, row in self.rates.items()))
        lines += ["", "Share of passages with a sample that is similar enough, its 95 % confidence interval (Wilson), "
                      "and the counts; lower is better.", ""]
        return "\n".join(lines)

    def save(self, directory: str | os.PathLike) -> list[Path]:
        """Write extraction.md, extraction.png and, last, results.json into a folder; returns the files.

        Raises:
            FlexOlmoError: one cannot be written.
        """
        table, picture, numbers = (Path(directory) / name
                                   for name in ("extraction.md", "extraction.png", "results.json"))
        with atomic_file(table) as file:
            file.write(self.to_markdown().encode("utf-8"))
        plot_extraction(self, picture)
        write_json(numbers, self.to_json())
        return [table, picture, numbers]


def plot_extraction(results: AuditResults, path: str | os.PathLike) -> None:
    """Draw the rates with their intervals as bars, a group for each model and a fill for each corpus."""
    models, corpora = list(results.rates), list(next(iter(results.rates.values())))
    height = 0.8 / len(corpora)
    with saved_figure(path, 1, 1, 8.0, 1.4 + max(0.4, 0.24 * len(corpora)) * len(models)) as (_, axes):
        axis = axes[0, 0]
        for index, corpus in enumerate(corpora):
            rates = [results.rates[model][corpus] for model in models]
            middles = [place - 0.4 + (index + 0.5) * height for place in range(len(models))]
            errors = [[100 * (rate.rate - rate.interval.low) for rate in rates],
                      [100 * (rate.interval.high - rate.rate) for rate in rates]]
            axis.barh(middles, [100 * rate.rate for rate in rates], height, xerr=errors, capsize=2, label=corpus,
                      **bar_style(index + 1))
        axis.set_yticks(range(len(models)), models)
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel("passages extracted (%, with 95 % confidence interval)")
        if len(corpora) > 1:
            axis.legend(title="corpus")
