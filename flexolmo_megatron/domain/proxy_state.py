"""What a run of proxy selection has done so far, in a folder of its own, so that the next start goes on with it.

The folder holds the classifier, signatures of the owner's documents, and the scores of every part of the public files
that is done, and meanwhile the texts of public documents that may become proxies. Nothing else in it is text, yet the
classifier and the signatures derive from the owner's documents: it stays with the owner, and goes when the run ends
well.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_megatron.files import atomic_file, read_json, write_json
from flexolmo_megatron.shards.run import open_state

_CLASSIFIER = "classifier"
_QUALITY = "quality.json"


class Scores(NamedTuple):
    """The usable documents of one public file, or of a part of it, in its order."""

    lines: np.ndarray
    """Line or row of each, int64 `[n]`."""
    logits: np.ndarray
    """float32 `[n]`."""
    sizes: np.ndarray
    """UTF-8 bytes of each text, int64 `[n]`."""
    bad: Counter[str]
    """Number of unusable documents of each kind."""


def counter_arrays(counter: Counter[str]) -> dict[str, np.ndarray]:
    """A counter as arrays ``kinds`` and ``counts``."""
    return {"kinds": np.array(list(counter), "U64"), "counts": np.array(list(counter.values()), np.int64)}


def as_counter(arrays: dict[str, np.ndarray]) -> Counter[str]:
    """The inverse of ``counter_arrays``."""
    return Counter(dict(zip(arrays["kinds"].tolist(), arrays["counts"].tolist(), strict=True)))


class ProxyState:
    """The folder ``OUT.state`` next to the output."""

    def __init__(self, out: Path, plan: dict[str, Any], files: dict[str, Sequence[Path]]) -> None:
        """Open the folder of an earlier start, or make one.

        Args:
            out: the output.
            plan: everything that the scores depend on, beside the ``files``.

        Raises:
            FlexOlmoError: the folder is of a run with another plan, or cannot be made.
        """
        self.folder = open_state(out, plan, files)

    def array_file(self, name: str) -> Path:
        """Where arrays are kept under ``name``."""
        return self.folder / f"{name}.npz"

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """Arrays that an earlier start has kept under ``name``, if any."""
        path = self.array_file(name)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)

    def save_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Keep arrays."""
        with atomic_file(self.array_file(name)) as file:
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

    def parts(self, wanted: int) -> int:
        """Into how many parts every public file is divided: what the first start wanted."""
        kept = self.arrays("parts")
        if kept is None:
            self.save_arrays("parts", parts=np.array(wanted))
            return wanted
        return int(kept["parts"])

    def is_scored(self, shard: int) -> bool:
        """Whether the part of a public file with this number is done."""
        return self.array_file(f"scores_{shard:06d}").exists()

    def save_scores(self, shard: int, scores: Scores) -> None:
        """Keep the scores of a part of a public file."""
        self.save_arrays(f"scores_{shard:06d}", lines=scores.lines, logits=scores.logits, sizes=scores.sizes,
                         **counter_arrays(scores.bad))

    def shard_scores(self, shard: int) -> Scores:
        """Scores of a part of a public file, which is done."""
        kept = self.arrays(f"scores_{shard:06d}")
        return Scores(kept["lines"], kept["logits"], kept["sizes"], as_counter(kept))

    def scores(self, files: int, parts: int) -> list[Scores]:
        """Scores of all public files, which are all done."""
        found = []
        for file in range(files):
            pieces = [self.shard_scores(shard) for shard in range(file * parts, (file + 1) * parts)]
            columns = [np.concatenate(column) for column in zip(*(piece[:3] for piece in pieces), strict=True)]
            order = np.argsort(columns[0], kind="stable")
            bad = sum((piece.bad for piece in pieces), Counter())
            found.append(Scores(*(column[order] for column in columns), bad))
        return found

    def remove(self) -> None:
        """Remove the folder: the output is complete."""
        shutil.rmtree(self.folder)
