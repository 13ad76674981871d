"""The table of a suite: models by groups of tasks, in the layout of the paper; higher is better."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexolmo_megatron.evaluation.markdown import number_table
from flexolmo_megatron.evaluation.suites.load import Suite
from flexolmo_megatron.files import atomic_file, write_json


@dataclass(frozen=True)
class TaskScore:
    """What a model reaches in one task."""

    score: float
    """In percent."""
    stderr: float | None
    """Its standard error over documents, in percent; None where the harness gives none."""
    documents: int
    truncated: int = 0
    """Requests (one per choice of a document, or per sample) whose context was longer than the model's sequences, and
    lost its beginning."""


def mean_score(scores: list[TaskScore]) -> TaskScore:
    """The unweighted mean; the parts' errors are taken as independent."""
    errors = [score.stderr for score in scores]
    stderr = None if None in errors else math.sqrt(math.fsum(error**2 for error in errors)) / len(scores)
    return TaskScore(math.fsum(score.score for score in scores) / len(scores), stderr,
                     sum(score.documents for score in scores), sum(score.truncated for score in scores))


@dataclass
class SuiteResults:
    """Every model has a score for every task that was run."""

    suite: Suite
    scores: dict[str, dict[str, TaskScore]]
    """By model, then by task of the suite."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Tasks that were not run, and why."""
    setup: dict[str, Any] = field(default_factory=dict)

    def groups(self, model: str) -> dict[str, TaskScore]:
        """Means of the groups of which every task was run."""
        return {group: mean_score([self.scores[model][task] for task in tasks])
                for group, tasks in self.suite.groups.items() if all(task in self.scores[model] for task in tasks)}

    def average(self, model: str) -> float | None:
        """Mean of the groups; None where one is missing, since it would not compare."""
        groups = self.groups(model)
        if len(groups) < len(self.suite.groups):
            return None
        return math.fsum(score.score for score in groups.values()) / len(groups)

    def to_json(self) -> dict[str, Any]:
        def values(scores: Mapping[str, TaskScore]) -> dict[str, Any]:
            return {name: asdict(score) for name, score in scores.items()}

        return {
            "suite": self.suite.name,
            "groups": {model: values(self.groups(model)) for model in self.scores},
            "average": {model: self.average(model) for model in self.scores},
            "tasks": {model: values(row) for model, row in self.scores.items()},
            "skipped": self.skipped,
            "notes": {name: {"verified": task.verified, "differs": task.differs}
                      for name, task in self.suite.tasks.items() if task.verified or task.differs},
            "setup": self.setup,
        }

    def to_markdown(self) -> str:
        """The groups and, below, the tasks, with a row per model; "-" for what was not run."""
        def number(score: TaskScore | None) -> str:
            return "-" if score is None else f"{score.score:.1f}"

        columns = list(self.suite.groups)
        rows = []
        for model in self.scores:
            groups, average = self.groups(model), self.average(model)
            rows.append([model, *(number(groups.get(group)) for group in columns),
                         "-" if average is None else f"{average:.1f}"])
        lines = number_table(["model", *columns, "Avg."], rows)
        lines += ["", "Percent, higher is better; standard errors and notes on each task are in results.json.", ""]
        run = [task for task in self.suite.tasks if any(task in row for row in self.scores.values())]
        lines += number_table(["task", *self.scores],
                              ([task, *(number(row.get(task)) for row in self.scores.values())] for task in run))
        lines += ["", *(f"Not run: {task} ({reason})." for task, reason in self.skipped.items()),
                  *(f"Contexts too long for the model: {score.truncated:,} requests of {task} to {model}."
                    for model, row in self.scores.items() for task, score in row.items() if score.truncated), ""]
        return "\n".join(lines)

    def save(self, directory: str | os.PathLike) -> list[Path]:
        """Write results.md and results.json into a folder; returns the files.

        Raises:
            FlexOlmoError: one cannot be written.
        """
        table, numbers = Path(directory) / "results.md", Path(directory) / "results.json"
        with atomic_file(table) as file:
            file.write(self.to_markdown().encode("utf-8"))
        write_json(numbers, self.to_json())
        return [table, numbers]
