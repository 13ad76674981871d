"""A launch to test with, and what tests do with its scripts."""

import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

from flexolmo_megatron.cli import main
from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, ModelCard
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.initial import random_model
from flexolmo_megatron.convert.model import save_model

LAUNCH = """\
out: {out}
slurm: {{partition: long, time: '1-12:00:00', nodes: 2, gpus_per_node: 4}}
anchor: {{documents: ['public/*.jsonl'], preset: tiny, options: ['data.train=[data/public]', global_batch_size=32]}}
experts:
  preset: tiny
  options: [train_iters=50, global_batch_size=32]
  each:
    code: {{documents: [code.jsonl], options: ['data.train=[data/code]']}}
    notes: {{domain_vector: notes.npz, options: ['data.train=[data/notes]', train_iters=70], owner: Ward 7}}
merge:
  domains: {{code: [code_valid.jsonl]}}
  merge_arguments: [--top-k, '2']
"""


def dry_run(capsys, path: Path, *overrides: str) -> str:
    assert main(["launch", str(path), "--dry-run", *overrides]) == 0
    return capsys.readouterr().out


def scripts(text: str) -> dict[str, str]:
    """The parts of what --dry-run prints, by the name of their file."""
    parts = re.split(r"^===== (.*)\n", text, flags=re.MULTILINE)[1:]
    return {Path(path).name: body.rstrip("\n") + "\n" for path, body in zip(parts[::2], parts[1::2], strict=True)}


def sbatch_options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def refused(capsys, path: Path, *overrides: str) -> str:
    assert main(["launch", str(path), "--dry-run", *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("flexolmo: ") and "\n" not in error
    return error


def run_script(text: str, folder: Path, **environment: str) -> list[list[str]]:
    """Run a job script with commands that only write down how they were called; returns the srun calls.

    Of the environment, STATUS is the exit status of training and SINGLE of other steps; SAVES a checkpoint that
    training leaves; LOGS a shell command, run in the folder of logs while training runs; STATE and LEFT what squeue
    says; SQUEUE and REQUEUE how often squeue and `scontrol requeue` fail first.
    """
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    failing = 'fail() {{ n=$(cat {0}/$1 2>/dev/null); echo $((${{n:-0}} + 1)) > {0}/$1; [ "${{n:-0}}" -lt "$2" ]; }}\n'
    for name, body in {
        "srun": f'printf "%s\\0" "$@" >> {folder}/calls; echo >> {folder}/calls\n'
                'case $* in *flexolmo_megatron.cli*) exit ${SINGLE:-0} ;; esac\n'
                'if [ "$SAVES" ]; then mkdir -p "out/experts/notes/run/checkpoints/$SAVES"; fi\n'
                'if [ "$LOGS" ]; then (cd out/logs/experts/notes && eval "$LOGS"); fi\nexit ${STATUS:-0}',
        "scontrol": failing.format(folder) + 'if [ "$1" != requeue ]; then echo one; echo two; exit; fi\n'
                    f'if fail scontrol_calls ${{REQUEUE:-0}}; then exit 1; fi\necho "$2" >> {folder}/requeued',
        "squeue": failing.format(folder) + 'if fail squeue_calls ${SQUEUE:-0}; then echo busy >&2; exit 1; fi\n'
                  'case $* in *%L*) echo ${LEFT:-1-02:03:04} ;; *) echo ${STATE:-RUNNING} ;; esac',
        "sleep": f'echo "$1" >> {folder}/slept',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)
    (folder / "calls").unlink(missing_ok=True)
    result = subprocess.run(
        ["bash"], input=text, text=True, capture_output=True, cwd=folder,
        env={"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "40017", "SLURM_JOB_NODELIST": "n[1-2]",
             **environment})
    (folder / "status").write_text(str(result.returncode))
    calls = folder / "calls"
    return [line.rstrip("\0").split("\0") for line in calls.read_text().splitlines()] if calls.exists() else []


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def publish(path: Path) -> None:
    """Save a published anchor of random weights, of the sizes of the preset tiny."""
    card = ModelCard("moe", replace(ModelConfig(), num_experts=1, top_k=1), [ExpertRecord(PUBLIC)])
    save_model(random_model(card, 0), path, "hf")
