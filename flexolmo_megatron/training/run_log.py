"""A run's record of its steps: ``metrics.jsonl`` and TensorBoard. Written by rank 0 alone."""

import json
import math
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter

from flexolmo_megatron.evaluation.metrics import METRICS_FILE
from flexolmo_megatron.files import atomic_file


class RunLog:
    """Where a run writes down each step; it never raises once it is open, but remembers that it has failed."""

    def __init__(self, run: Path, step: int) -> None:
        """Open the record for the steps after ``step``, without those that will be done again.

        Raises:
            FlexOlmoError, OSError: it cannot be written.
        """
        self._path = run / METRICS_FILE
        self.failure: str | None = None
        """Why the record is not complete any more."""
        if self._path.exists():
            _forget_after(self._path, step)
        self._file: IO[str] = self._path.open("a", buffering=1, encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add one step: names and values; a number that is not finite has no place in JSON and is left out."""
        if self.failure is not None:
            return
        row = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        try:
            self._file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, row["step"])
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        for part in (self._file, self._board):
            try:
                part.close()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = self.failure or (
            f"cannot write {self._path}, or tensorboard beside it: {error.strerror or error}; checkpoints are intact"
        )


def _forget_after(path: Path, step: int) -> None:
    """Keep the lines of the steps up to ``step``; a line that a kill has torn is no loss, its step will be done again
    or is only missing from the record."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_file(path, "w") as file:
        file.writelines(kept)
