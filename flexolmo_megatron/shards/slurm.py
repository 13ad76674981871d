"""datatrove's Slurm executor: shards are tasks of a job array, and the command that submits it waits for its end."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.stats import PipelineStats
from omegaconf import MISSING

from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file
from flexolmo_megatron.launch.load import TIME
from flexolmo_megatron.shards.local import keep_off_the_terminal
from flexolmo_megatron.shards.run import SCRIPT

_POLL = 2.0
"""Seconds between two looks at the queue."""
_SETTLE = 30.0
"""Seconds after a job's end in which what it wrote must have become visible here."""
_ERRORS, _JOB = "errors", "job"


@dataclass
class SlurmOptions:
    """The YAML file of ``--slurm``."""

    partition: str = MISSING
    time: str = MISSING
    """Limit of a task, as in 04:00:00."""
    tasks: int = 100
    """Tasks that run at the same time, at most."""
    cpus_per_task: int = 1
    memory: str = "4G"
    """Of a task, for each of its processors."""
    account: str | None = None
    qos: str | None = None
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch by their long names."""
    setup: list[str] = field(default_factory=list)
    """Shell commands that each task begins with."""


def load_slurm_options(path: str) -> SlurmOptions:
    """Read the YAML file of ``--slurm``.

    Raises:
        FlexOlmoError: it cannot be read, has an unknown key, lacks one, or a value is out of range.
    """
    options = load_config(SlurmOptions, paths=[path])
    if not TIME.fullmatch(options.time):
        raise FlexOlmoError(f"{path}: time = {options.time}: expected text in quotes, as '12:00:00' (without quotes, "
                            "YAML takes it for a number)")
    for key in ("tasks", "cpus_per_task"):
        if getattr(options, key) < 1:
            raise FlexOlmoError(f"{path}: {key} = {getattr(options, key)}: expected a number of at least 1")
    return options


class SlurmExecutor(SlurmPipelineExecutor):
    """Submits the shards that are not done and waits; on a start after a stop, for the job that is still there."""

    def __init__(self, options: SlurmOptions, **arguments: Any) -> None:
        """Take the options and what every executor takes."""
        extra = {"account": options.account} if options.account else {}
        # Tasks find datatrove's programs beside this Python's.
        path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        super().__init__(partition=options.partition, time=options.time, workers=options.tasks, qos=options.qos,
                         cpus_per_task=options.cpus_per_task, env_command="\n".join([path, *options.setup]),
                         sbatch_args={"mem-per-cpu": options.memory, **extra, **options.sbatch}, **arguments)
        self.submitted = False
        """Of what a task loads, true."""

    def launch_merge_stats(self) -> None:
        """No second job only to sum the counts: whoever waits for the shards does that."""

    def run(self) -> None:
        """In a task: work on its shard. Elsewhere: submit and wait.

        Raises:
            FlexOlmoError: there is no Slurm, it refuses the job, or a shard failed.
        """
        if self.submitted:
            super().run()
            return
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            raise FlexOlmoError("--slurm cannot be used within a task of a Slurm job array: start it elsewhere")
        if shutil.which("sbatch") is None:
            raise FlexOlmoError("--slurm: sbatch was not found; expected the clients of Slurm on this machine")
        keep_off_the_terminal()
        folder = Path(self.logging_dir.path)
        shutil.rmtree(folder / _ERRORS, ignore_errors=True)
        job = (folder / _JOB).read_text() if (folder / _JOB).exists() else ""
        if not job or job not in (_queue() or ()):
            self.submitted = True
            try:
                self.launch_job()
            except subprocess.CalledProcessError as error:
                raise FlexOlmoError(f"sbatch refused the job {folder / SCRIPT} with exit status "
                                    f"{error.returncode}") from error
            job = str(self.job_id)
            with atomic_file(folder / _JOB, "w") as file:
                file.write(job)
        print(f"{self.job_name}: job {job} of Slurm; the same command waits for it again after a stop",
              file=sys.stderr, flush=True)
        self._wait(folder, job)

    def _wait(self, folder: Path, job: str) -> None:
        ended = None
        while left := self.get_incomplete_ranks():
            queue = _queue()
            if queue is not None and job not in queue:
                ended = ended or time.monotonic()
                reasons = sorted((folder / _ERRORS).glob("*")) if (folder / _ERRORS).exists() else []
                if reasons:
                    (folder / SCRIPT).unlink(missing_ok=True)
                    raise FlexOlmoError(reasons[0].read_text())
                if time.monotonic() - ended > _SETTLE:
                    raise FlexOlmoError(f"job {job} of Slurm has ended and {len(left)} of {self.tasks} shards are not "
                                        f"done; see {folder}/slurm_logs, then start the same command again")
            self.logging_dir.invalidate_cache()
            time.sleep(_POLL)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        except FlexOlmoError as error:
            folder = Path(self.logging_dir.path) / _ERRORS
            folder.mkdir(exist_ok=True)
            with atomic_file(folder / f"{rank:06d}", "w") as file:
                file.write(str(error))
            raise


def _queue() -> set[str] | None:
    """Numbers of the user's jobs that wait or run; None if Slurm does not answer now."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        found = subprocess.run(["squeue", "--me", "--noheader", "--format=%F"], capture_output=True, text=True,
                               timeout=60)
        if not found.returncode:
            return set(found.stdout.split())
    return None
