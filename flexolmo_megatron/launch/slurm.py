"""Handing a launch to Slurm: scripts beside the run, jobs that wait for each other, and a record of both."""

import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from flexolmo_megatron.config.card import TUNED_MODEL
from flexolmo_megatron.config.load import save_config
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file, read_json, write_json
from flexolmo_megatron.launch.config import LaunchConfig, expert_names
from flexolmo_megatron.launch.render import (
    package_of,
    render_anchor,
    render_experts,
    render_merge,
    render_router,
    template,
)

FUNCTIONS = "functions.sh"
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
         "OUT_OF_MEMORY")


@dataclass
class Job:
    """One script to submit."""

    stage: str
    """anchor, experts, merge or router."""
    script: Path
    """Where it is saved."""
    text: str
    after: list[str] = field(default_factory=list)
    """Stages of the same launch that must have succeeded before it starts."""
    experts: list[str] = field(default_factory=list)
    """Of the stage experts: who is trained."""

    def command(self, numbers: dict[str, str]) -> list[str]:
        """How it is submitted, given the job numbers of the stages before it."""
        dependency = ":".join(numbers[stage] for stage in self.after)
        return ["sbatch", "--parsable", *([f"--dependency=afterok:{dependency}"] if dependency else []),
                str(self.script)]


def plan_jobs(config: LaunchConfig) -> list[Job]:
    """The jobs that a launch still needs, in order; what is there already is not done again.

    Raises:
        FlexOlmoError: there is a merged model without an expert that is still to be trained.
    """
    out = Path(config.out)
    jobs = []
    if config.anchor and not Path(out, "anchor").exists():
        jobs.append(_job("anchor", out, render_anchor(config), []))
    names = expert_names(config)
    missing = [name for name in names if not package_of(config, name).exists()]
    if missing:
        jobs.append(_job("experts", out, render_experts(config, missing), jobs))
        jobs[-1].experts = missing
    if config.merge:
        if missing and Path(out, "merged").exists():
            raise FlexOlmoError(f"{out / 'merged'} exists already, without {', '.join(missing)}, still to be trained: "
                                "move it away, or name a new folder as out")
        evaluated = not config.merge.domains or Path(out, "evaluation").exists()
        if not (Path(out, "merged").exists() and evaluated):
            jobs.append(_job("merge", out, render_merge(config), jobs))
    if config.router:
        evaluated = not config.merge.domains or Path(out, "evaluation_tuned").exists()
        if not (Path(out, "router", TUNED_MODEL).exists() and evaluated):
            jobs.append(_job("router", out, render_router(config), jobs))
    return jobs


def _job(stage: str, out: Path, text: str, before: list[Job]) -> Job:
    return Job(stage, out / "slurm" / f"{stage}.sbatch", text, [job.stage for job in before[-1:]])


def _scripts(config: LaunchConfig, jobs: list[Job]) -> dict[Path, str]:
    """The files to save, by path."""
    return {Path(config.out, "slurm", FUNCTIONS): template(FUNCTIONS), **{job.script: job.text for job in jobs}}


def show(config: LaunchConfig, jobs: list[Job]) -> str:
    """What would be saved and submitted, as text."""
    numbers = {job.stage: f"<number of {job.stage}>" for job in jobs}
    commands = (" ".join(word if "<" in word else shlex.quote(word) for word in job.command(numbers)) for job in jobs)
    return "".join((*(f"===== {path}\n{text}\n" for path, text in _scripts(config, jobs).items()),
                    "===== to be submitted with\n", *(f"{command}\n" for command in commands)))


def require_sbatch() -> None:
    """Refuse to go on where there is no Slurm.

    Raises:
        FlexOlmoError: there is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise FlexOlmoError("there is no sbatch on this machine: start `flexolmo launch` where Slurm's commands are, "
                            "or look at the scripts with --dry-run")


def submit(config: LaunchConfig, jobs: list[Job]) -> dict[str, str]:
    """Save the scripts, hand them to sbatch, and record their numbers in ``OUT/slurm/jobs.json``.

    Returns:
        Job number of each stage.

    Raises:
        FlexOlmoError: there is no sbatch, it refuses a script, or jobs of an earlier launch are not over.
    """
    require_sbatch()
    out = Path(config.out)
    record = out / "slurm" / "jobs.json"
    if record.exists():
        _check_ended(record)
    for folder in (out / "slurm", out / "logs"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FlexOlmoError(f"{folder} cannot be made: {error.strerror}") from error
    save_config(config, out / "slurm" / "launch.yaml")
    for path, text in _scripts(config, jobs).items():
        with atomic_file(path, "w") as file:
            file.write(text)
    numbers: dict[str, str] = {}
    entries: dict[str, dict[str, str]] = {}
    for job in jobs:
        command = job.command(numbers)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            done = ", ".join(f"{stage} {number}" for stage, number in numbers.items())
            raise FlexOlmoError(f"sbatch refused {job.script}: {' '.join(result.stderr.split())}"
                                + (f"; already submitted, to be cancelled with scancel: {done}" if done else ""))
        numbers[job.stage] = result.stdout.strip().partition(";")[0]
        entries[job.stage] = {"job": numbers[job.stage], "command": shlex.join(command)}
        write_json(record, entries)
        _log(out, job, numbers)
    return numbers


def _log(out: Path, job: Job, numbers: dict[str, str]) -> None:
    experts = f", expert{'s' * (len(job.experts) > 1)} {', '.join(job.experts)}" if job.experts else ""
    waits = "".join(f", after job {numbers[stage]}" for stage in job.after)
    with open(out / "launch.log", "a", encoding="utf-8") as log:
        log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {job.stage}: submitted as job {numbers[job.stage]}{experts}"
                  f"{waits}\n")


def _check_ended(record: Path) -> None:
    """Two launches into one folder would train the same runs twice."""
    for stage, entry in read_json(record, "the record of a launch").items():
        try:
            result = subprocess.run(["squeue", "--noheader", "--format=%T", f"--jobs={entry['job']}"],
                                    capture_output=True, text=True)
        except OSError as error:
            raise FlexOlmoError(f"squeue cannot be started ({error.strerror}), to ask for job {entry['job']} ({stage}) "
                                "of an earlier launch into the same folder") from None
        if result.returncode and "Invalid job id" not in result.stderr:  # that is a number long gone
            raise FlexOlmoError(f"squeue does not say whether job {entry['job']} ({stage}) of an earlier launch into "
                                f"the same folder is over: {' '.join(result.stderr.split()) or 'no reason given'}; try "
                                "again when it does")
        states = [state for state in result.stdout.split() if state not in ENDED]
        if states:
            raise FlexOlmoError(f"job {entry['job']} ({stage}) of an earlier launch into the same folder is still "
                                f"{states[0]}: wait for it, or end it with scancel {entry['job']}")
