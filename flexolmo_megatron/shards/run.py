"""Running a pipeline of datatrove steps over shards, on this machine or on Slurm, with progress and resumption.

A folder holds what is known about a run: which shards are done (``completions``), a log (``logs``) and the counts
(``stats``) of each, all of datatrove, and notes on progress. datatrove's own messages go to its logs alone: on a
terminal there is a bar, in a log a line now and then.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import TEMPORARY_SUFFIX, read_json, write_json
from flexolmo_megatron.shards import require_datatrove
from flexolmo_megatron.training.progress import DocumentProgress

if TYPE_CHECKING:
    from flexolmo_megatron.shards.slurm import SlurmOptions

SCRIPT = "launch_script.slurm"
"""datatrove's name for the script of a Slurm job, which is there while the job may still do shards of the folder."""
_PLAN, _PROGRESS = "plan.json", "progress"
_POLL = 0.5
"""Seconds between two looks at the progress."""


@dataclass(frozen=True)
class Where:
    """Where shards are worked on."""

    workers: int = 1
    """Processes on this machine."""
    slurm: "SlurmOptions | None" = None
    """If any, shards are tasks of a job array instead."""

    @classmethod
    def of(cls, workers: int, slurm: str | None) -> "Where":
        """Take what the command line gives: processes, and a YAML file with options of Slurm if it is to be used.

        Raises:
            FlexOlmoError: a value is out of range, or the file cannot be used.
        """
        if workers < 1:
            raise FlexOlmoError(f"--workers {workers}: expected a number of at least 1")
        if slurm is None:
            return cls(workers)
        require_datatrove("--slurm")
        from flexolmo_megatron.shards.slurm import load_slurm_options

        return cls(workers, load_slurm_options(slurm))

    @property
    def at_once(self) -> int:
        """Shards that are worked on at the same time, at most: fewer would leave processors idle."""
        return self.slurm.tasks if self.slurm else self.workers


def file_identity(path: Path) -> list[Any]:
    """What changes if a file does: its path, size and time of change."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def open_state(out: Path, plan: dict[str, Any], files: dict[str, Sequence[Path]]) -> Path:
    """The folder ``OUT.state`` beside the output ``out``: that of an earlier start, or a new one.

    Args:
        out: output.
        plan: all that what is kept depends on, by name.
        files: input files that it depends on, by the name of their kind.

    Raises:
        FlexOlmoError: the folder is of a run with another plan or of something else, or cannot be made.
    """
    folder = out.absolute().with_name(f"{out.name}.state")
    identities = {kind: [file_identity(path) for path in paths] for kind, paths in files.items()}
    plan = json.loads(json.dumps({**plan, **identities}))
    if (folder / _PLAN).exists():
        earlier = read_json(folder / _PLAN, "the plan of an earlier start")
        changed = [key for key in plan if not isinstance(earlier, dict) or earlier.get(key) != plan[key]]
        if changed:
            raise FlexOlmoError(f"{folder} is what an earlier start with another choice of {', '.join(changed)} has "
                                "left: repeat that choice to go on with it, or remove the folder")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FlexOlmoError(f"cannot make the folder {folder}: {error.strerror}") from error
        if any(path.suffix != TEMPORARY_SUFFIX for path in folder.iterdir()):
            raise FlexOlmoError(f"{folder} is no folder of an earlier start, and would be removed at the end: expected "
                                "another output, or none of that name")
        write_json(folder / _PLAN, plan)
    return folder


@contextmanager
def kept_if_begun(state: Path) -> Iterator[None]:
    """Remove the folder of ``open_state`` if the block ends on a mistake or Ctrl-C and no shard is done: it then holds
    nothing to go on with, and would only keep the mended command from making another choice."""
    try:
        yield
    except (FlexOlmoError, KeyboardInterrupt):
        if not any(state.glob("**/completions/*")) and not any(state.glob(f"**/{SCRIPT}")):
            rmtree(state, ignore_errors=True)
        raise


def progress_folder(folder: Path) -> Path:
    """Where the shards of the run in ``folder`` note their progress."""
    path = folder / _PROGRESS
    path.mkdir(parents=True, exist_ok=True)
    return path


def run_shards(pipeline: Sequence[Any], shards: int, folder: Path, where: Where, name: str) -> None:
    """Run the shards that are not done yet, and return when all are.

    Args:
        pipeline: datatrove steps, of which the first is a ``ReadDocuments``. Each process gets a copy.
        shards: number of shards.
        folder: of the run; the same one on each start, and on a file system that all nodes see.
        where: see there.
        name: of the work, for the job and for errors.

    Raises:
        FlexOlmoError: a shard failed for a reason that the user can mend, or was killed.
    """
    from flexolmo_megatron.shards.documents import progress_of
    from flexolmo_megatron.shards.local import LocalExecutor
    from flexolmo_megatron.shards.slurm import SlurmExecutor

    notes = progress_folder(folder)
    arguments = {"pipeline": list(pipeline), "tasks": shards, "logging_dir": str(folder.absolute())}
    if where.slurm is None:
        executor: Any = LocalExecutor(workers=min(where.workers, shards), **arguments)
    else:
        executor = SlurmExecutor(where.slurm, job_name=name.replace(" ", "_"), **arguments)
    if not executor.get_incomplete_ranks():
        return
    with _shown(lambda: progress_of(notes)):
        executor.run()


@contextmanager
def _shown(read: Any) -> Any:
    """Show the documents and bytes that ``read`` returns, without those of earlier starts, until the block ends."""
    stop = threading.Event()
    first = seen = read()

    with DocumentProgress() as progress:

        def update() -> None:
            nonlocal seen
            now = read()
            # A shard that is begun again starts from nothing.
            more = [max(0, new - max(old, start)) for new, old, start in zip(now, seen, first, strict=True)]
            progress.add(*more)
            seen = tuple(max(new, old) for new, old in zip(now, seen, strict=True))

        def watch() -> None:
            while not stop.wait(_POLL):
                update()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            update()


def step_counts(folder: Path) -> list[dict[str, int]]:
    """The counts of each step of the pipeline, summed over all shards of a run that is done."""
    total: list[Counter[str]] = []
    for path in sorted((folder / "stats").glob("*.json")):
        steps = json.loads(path.read_text())
        total = total or [Counter() for _ in steps]
        for counter, step in zip(total, steps, strict=True):
            # datatrove writes a count of ones as a number, and others with their mean and spread.
            counter.update({key: int(value["total"] if isinstance(value, dict) else value)
                            for key, value in step["stats"].items()})
    return [dict(counter) for counter in total]
