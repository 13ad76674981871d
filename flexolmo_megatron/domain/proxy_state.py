"""What a run of proxy selection has done so far, in a folder of its own, so that the next start goes on with it.

The folder holds the classifier, signatures of the owner's documents, and the scores of every public file that is done.
None of it is text, yet the classifier and the signatures derive from the owner's documents: it stays with the owner,
and goes when the run ends well.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file, read_json, write_json

_PLAN = "plan.json"
_CLASSIFIER = "classifier"
_QUALITY = "quality.json"


class Scores(NamedTuple):
    """The usable documents of one public file, in its order."""

    lines: np.ndarray
    """Line or row of each, int64 `[n]`."""
    logits: np.ndarray
    """float32 `[n]`."""
    sizes: np.ndarray
    """UTF-8 bytes of each text, int64 `[n]`."""
    bad: Counter[str]
    """Number of unusable documents of each kind."""


def file_identity(path: Path) -> list[Any]:
    """What changes if a file does: its path, size and time of change."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def counter_arrays(counter: Counter[str]) -> dict[str, np.ndarray]:
    """A counter as arrays ``kinds`` and ``counts``."""
    return {"kinds": np.array(list(counter), "U64"), "counts": np.array(list(counter.values()), np.int64)}


def as_counter(arrays: dict[str, np.ndarray]) -> Counter[str]:
    """The inverse of ``counter_arrays``."""
    return Counter(dict(zip(arrays["kinds"].tolist(), arrays["counts"].tolist(), strict=True)))


class ProxyState:
    """The folder ``OUT.state`` next to the output."""

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        """Open the folder of an earlier start, or make one.

        Args:
            out: the output.
            plan: everything that the scores depend on.

        Raises:
            FlexOlmoError: the folder is of a run with another plan, or cannot be made.
        """
        self.folder = out.with_name(f"{out.name}.state")
        plan = json.loads(json.dumps(plan))
        if (self.folder / _PLAN).exists():
            earlier = read_json(self.folder / _PLAN, "the plan of an earlier start")
            changed = [key for key in plan if not isinstance(earlier, dict) or earlier.get(key) != plan[key]]
            if changed:
                raise FlexOlmoError(f"{self.folder} is what an earlier start with another choice of "
                                    f"{', '.join(changed)} has left: repeat that choice to go on with it, or remove "
                                    "the folder")
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FlexOlmoError(f"cannot make the folder {self.folder}: {error.strerror}") from error
            write_json(self.folder / _PLAN, plan)
        self.spool = self.folder / "candidates.jsonl"

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """Arrays that an earlier start has kept under ``name``, if any."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)

    def save_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Keep arrays."""
        with atomic_file(self.folder / f"{name}.npz") as file:
            np.savez(file, **arrays)

    def classifier_folder(self) -> Path:
        """Where the classifier is; it is complete if there is a ``quality``."""
        folder = self.folder / _CLASSIFIER
        folder.mkdir(exist_ok=True)
        return folder

    def quality(self) -> dict[str, Any] | None:
        """What was found out about the classifier; None as long as it is not trained."""
        path = self.folder / _QUALITY
        return read_json(path, "the quality of the classifier") if path.exists() else None

    def save_quality(self, quality: dict[str, Any]) -> None:
        """Keep it, as a sign that the classifier is complete."""
        write_json(self.folder / _QUALITY, quality)

    def is_scored(self, file: int) -> bool:
        """Whether the public file with this number is done."""
        return (self.folder / f"scores_{file:06d}.npz").exists()

    def save_scores(self, file: int, scores: Scores) -> None:
        """Keep the scores of a whole public file."""
        self.save_arrays(f"scores_{file:06d}", lines=scores.lines, logits=scores.logits, sizes=scores.sizes,
                         **counter_arrays(scores.bad))

    def scores(self, files: Sequence[Path]) -> list[Scores]:
        """Scores of all public files, which are all done."""
        kept = [self.arrays(f"scores_{file:06d}") for file in range(len(files))]
        return [Scores(one["lines"], one["logits"], one["sizes"], as_counter(one)) for one in kept]

    def remove(self) -> None:
        """Remove the folder: the output is complete."""
        shutil.rmtree(self.folder)
