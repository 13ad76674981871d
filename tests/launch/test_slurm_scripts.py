"""The scripts of `flexolmo launch`, without Slurm: rendering, --dry-run, and what is refused before it is queued."""

import os
import re
import shlex
import stat
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from flexolmo_megatron.cli import main
from flexolmo_megatron.commands.launch import EXAMPLE
from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, ModelCard
from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.convert.initial import random_model
from flexolmo_megatron.convert.model import save_model
from flexolmo_megatron.errors import REQUEUE_STATUS, FlexOlmoError
from flexolmo_megatron.launch.slurm import _check_ended
from tests.slurm.cluster import unavailable

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples" / "slurm"

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


@pytest.fixture
def launch_file(tmp_path) -> Path:
    path = tmp_path / "launch.yaml"
    path.write_text(LAUNCH.format(out=tmp_path / "out"))
    return path


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


def test_examples_are_what_the_example_configuration_renders(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    rendered = scripts(dry_run(capsys, EXAMPLES / "launch.yaml"))
    kept = {path.name: path.read_text() for path in EXAMPLES.iterdir() if path.suffix in (".sbatch", ".sh")}
    assert set(kept) == {"anchor.sbatch", "experts.sbatch", "merge.sbatch", "router.sbatch", "functions.sh"}
    for name, text in kept.items():
        assert rendered[name] == text, f"write examples/slurm/{name} anew from flexolmo launch --dry-run"


def test_every_script_is_valid_bash(capsys, launch_file):
    for name, text in scripts(dry_run(capsys, launch_file)).items():
        if name.endswith((".sbatch", ".sh")):
            result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
            assert result.returncode == 0 and not result.stderr, (name, result.stderr)
            assert "{{" not in text and "\n\n\n" not in text


def test_what_is_asked_of_slurm(capsys, launch_file, tmp_path):
    parts = scripts(dry_run(capsys, launch_file, "slurm.account=lab", "experts.slurm={nodes: 1, options: {mem: 0}}",
                            "slurm.options={exclusive: true, hint: null, spread-job: false, comment: 'two words'}"))
    anchor, experts, merge = (sbatch_options(parts[f"{stage}.sbatch"]) for stage in ("anchor", "experts", "merge"))
    assert anchor == {
        "job-name": "out-anchor", "account": "lab", "partition": "long", "time": "1-12:00:00", "nodes": "2",
        "ntasks-per-node": "4", "gpus-per-node": "4", "output": f"{tmp_path}/out/logs/anchor.log",
        "open-mode": "append", "requeue": "", "signal": "USR1@300", "kill-on-invalid-dep": "yes", "exclusive": "",
        "hint": "", "comment": '"two words"'}
    assert experts == {**anchor, "job-name": "out-experts", "nodes": "1", "mem": "0", "array": "0,1",
                       "output": f"{tmp_path}/out/logs/experts_%a.log"}
    assert merge == {**anchor, "job-name": "out-merge", "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "1",
                     "output": f"{tmp_path}/out/logs/merge.log"}


def test_without_gpus_and_names_nothing_of_a_cluster_is_asked_for(capsys, launch_file):
    text = dry_run(capsys, launch_file, "slurm.gpus_per_node=0", "slurm.partition=null", "slurm.time=null")
    for stage in ("anchor", "experts", "merge"):
        options = sbatch_options(scripts(text)[f"{stage}.sbatch"])
        assert not {"partition", "time", "account", "qos", "gpus-per-node", "cpus-per-task"} & set(options)
        assert options["ntasks-per-node"] == "1"


def test_dry_run_says_how_jobs_would_be_submitted_and_writes_nothing(capsys, launch_file, tmp_path):
    text = dry_run(capsys, launch_file)
    folder = f"{tmp_path}/out/slurm"
    assert text.endswith(
        "===== to be submitted with\n"
        f"sbatch --parsable {folder}/anchor.sbatch\n"
        f"sbatch --parsable --dependency=afterok:<number of anchor> {folder}/experts.sbatch\n"
        f"sbatch --parsable --dependency=afterok:<number of experts> {folder}/merge.sbatch\n")
    assert not (tmp_path / "out").exists()


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


@pytest.fixture
def saved(capsys, launch_file, tmp_path, monkeypatch):
    """A function that gives a stage's script, with its functions saved where it looks for them."""
    monkeypatch.chdir(tmp_path)

    def save(stage: str, *overrides: str) -> str:
        parts = scripts(dry_run(capsys, launch_file, *overrides))
        (tmp_path / "out" / "slurm").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "slurm" / "functions.sh").write_text(parts["functions.sh"])
        return parts[f"{stage}.sbatch"]

    return save


ARRAY = {"SLURM_ARRAY_JOB_ID": "40016", "SLURM_ARRAY_TASK_ID": "1"}


def test_commands_of_an_expert(saved, tmp_path):
    out = tmp_path / "out"
    container = ["slurm.srun_options={container-image: img}", "slurm.python=apptainer run python"]
    train, pack = run_script(saved("experts", *container), tmp_path, **ARRAY)  # its domain vector is there already
    assert {"--export=ALL", "--kill-on-bad-exit=0", "--container-image=img", "--wait=60",
            f"--output={out}/logs/experts/notes/train.rank_%t.log"} <= set(train)
    assert train[train.index("rank") + 1:] == [
        "apptainer", "run", "python", "-m", "flexolmo_megatron.train", "expert", "--preset", "tiny", "train_iters=50",
        "global_batch_size=32", "data.train=[data/notes]", "train_iters=70", f"out={out}/experts/notes/run",
        f"anchor={out}/anchor",
        "expert.name=notes", "expert.domain_vector=notes.npz"]
    assert pack[pack.index("-m"):] == ["-m", "flexolmo_megatron.cli", "pack", f"{out}/experts/notes/run",
                                       f"{out}/experts/notes/package", "--owner", "Ward 7"]
    assert (tmp_path / "status").read_text() == "0"
    assert "expert notes (job 40016_1): packed in" in (out / "launch.log").read_text()


def test_commands_of_anchor_and_merge(saved, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "anchor").mkdir()
    train, embed = run_script(saved("anchor"), tmp_path / "anchor")
    assert train[train.index("rank") + 1:] == ["python", "-m", "flexolmo_megatron.train", "anchor", "--preset", "tiny",
                                               "data.train=[data/public]", "global_batch_size=32",
                                               f"out={out}/anchor_run"]
    assert embed[embed.index("embed"):] == ["embed", "public/*.jsonl", "--anchor", f"{out}/anchor_run", "--out",
                                            f"{out}/public.npz", "--publish", f"{out}/anchor"]
    (tmp_path / "merge").mkdir()
    merge, evaluate = run_script(saved("merge"), tmp_path / "merge")
    assert merge[merge.index("merge"):] == ["merge", "--anchor", f"{out}/anchor", f"{out}/experts/code/package",
                                            f"{out}/experts/notes/package", "--out", f"{out}/merged", "--top-k", "2"]
    assert evaluate[evaluate.index("eval"):] == [
        "eval", "--out", f"{out}/evaluation", "--reference", "public", "--routing", "--model", f"public={out}/anchor",
        "--model", f"merged={out}/merged", "--model", f"without code={out}/merged@-code",
        "--model", f"without notes={out}/merged@-notes", "--domain", "code=code_valid.jsonl"]


def log_of(folder: Path) -> str:
    return (folder / "out" / "launch.log").read_text()


ERROR = "printf 'Traceback\\n  x\\nValueError: odd\\n' > train.rank_3.log"
STOPPED = "echo 'flexolmo: r: stopped after step 4 of 9, which is saved; more' > train.rank_0.log"


@pytest.mark.parametrize("status, environment, requeued, line", [
    ("75", {}, True, "interrupted in train (exit status 75): back into the queue"),
    ("143", {"SLURM_RESTART_COUNT": "90"}, True, "interrupted in train (exit status 143): back into the queue"),
    *(("75", {"STATE": state}, False, f"interrupted in train (exit status 75): left to Slurm, which is ending the job "
       f"({state})") for state in ("COMPLETING", "CANCELLED", "PREEMPTED", "TIMEOUT")),
    ("75", {"STATE": "SUSPENDED"}, True, "back into the queue"),
    ("75", {"SQUEUE": "2", "STATE": "COMPLETING"}, False, "left to Slurm, which is ending the job (COMPLETING)"),
    ("75", {"SQUEUE": "9", "STATE": "COMPLETING"}, True, "back into the queue"),
    ("75", {"REQUEUE": "2"}, True, "back into the queue"),
    ("75", {"REQUEUE": "3"}, False, "Slurm does not put it back into the queue"),
    ("75", {"REQUEUE": "3"}, False, "FAILED in train with exit status 75; see"),
    ("1", {}, True, "crashed in train (exit status 1): back into the queue"),
    ("137", {}, True, "crashed (killed, perhaps for want of memory) in train (exit status 137): back into the queue"),
    ("137", {"SAVES": "step_00000040"}, True, "crashed after step_00000040 (killed, perhaps for want of memory) in"),
    ("137", {"LOGS": ERROR}, True, "crashed (rank 3: ValueError: odd) in train (exit status 137): back into"),
    ("1", {"LOGS": "echo '[rank2]: a.b.OddError: c' > train.rank_2.log"}, True, "crashed (rank 2: a.b.OddError: c) in"),
    # What processes say that lost another one tells nothing, if only there is something else.
    ("1", {"LOGS": "echo 'DistBackendError: NCCL' > train.rank_0.log; " + ERROR}, True, "(rank 3: ValueError: odd)"),
    ("1", {"LOGS": "echo 'DistBackendError: NCCL' > train.rank_0.log"}, True, "(rank 0: DistBackendError: NCCL)"),
    # One process has refused its input, the others were killed.
    ("137", {"LOGS": "echo 'flexolmo: a is bad' > train.rank_1.log; " + ERROR}, False,
     "FAILED in train with exit status 2: rank 1: a is bad; see"),
    ("137", {"LOGS": STOPPED}, True, "crashed (killed, perhaps for want of memory) in train"),
    ("137", {"LOGS": f"{STOPPED}; {ERROR}"}, True, "crashed (rank 3: ValueError: odd) in train"),
    ("2", {"SAVES": "step_00000040"}, False, "FAILED in train with exit status 2; see"),
])
def test_what_an_exit_status_leads_to(saved, tmp_path, status, environment, requeued, line):
    run_script(saved("experts"), tmp_path, STATUS=status, **ARRAY, **environment)
    assert (tmp_path / "requeued").exists() is requeued
    if requeued:  # 40017 may stand for the whole array
        assert (tmp_path / "requeued").read_text() == "40016_1\n"
    assert (tmp_path / "status").read_text() == ("2" if "exit status 2" in line else status)
    assert line in log_of(tmp_path)


def test_what_an_earlier_start_has_said_is_no_reason(saved, tmp_path):
    script = saved("experts")
    run_script(script, tmp_path, STATUS="2", LOGS="echo flexolmo: old > train.rank_0.log", **ARRAY)
    run_script(script, tmp_path, STATUS="137", LOGS="echo 'step 1' >> train.rank_0.log", **ARRAY)
    first, second = log_of(tmp_path).splitlines()
    assert "FAILED in train with exit status 2: rank 0: old; see" in first
    assert "crashed (killed, perhaps for want of memory) in train (exit status 137): back" in second


def test_the_third_crash_in_a_row_without_progress_is_the_last(saved, tmp_path):
    script = saved("experts")
    for saves in ("", "", "step_00000010", "", "", ""):
        assert "FAILED" not in (log_of(tmp_path) if (tmp_path / "out" / "launch.log").exists() else "")
        run_script(script, tmp_path, STATUS="1", SAVES=saves, LOGS=f"echo $MASTER_PORT >>{tmp_path}/ports", **ARRAY)
    assert (tmp_path / "requeued").read_text().count("\n") == 5
    assert (tmp_path / "ports").read_text().split() == ["25017", "26026", "27035"] * 2
    *_, third, last = log_of(tmp_path).splitlines()
    assert "the third crash in a row without a new checkpoint" in third and "FAILED in train with exit" in last


def test_only_our_own_requeues_count(saved, tmp_path):
    script = saved("experts", "slurm.requeues=2")
    for _ in range(2):
        run_script(script, tmp_path, STATUS="75", SLURM_RESTART_COUNT="7", **ARRAY)
        run_script(script, tmp_path, STATUS="75", STATE="PREEMPTED", **ARRAY)
    run_script(script, tmp_path, STATUS="75", **{**ARRAY, "SLURM_ARRAY_JOB_ID": "50000"})  # another submission
    assert (tmp_path / "requeued").read_text() == "40016_1\n40016_1\n50000_1\n"
    run_script(script, tmp_path, STATUS="75", **ARRAY)
    assert "interrupted once more after 2 requeues, the most that slurm.requeues allows" in log_of(tmp_path)


@pytest.mark.parametrize("environment, packs, requeued, line", [
    ({"SAVES": "step_1", "SINGLE": "138"}, True, True, "interrupted in pack (exit status 138): back into the queue"),
    ({"SINGLE": "138"}, True, False, "FAILED in pack with exit status 138: not done within the time limit"),
    ({"SAVES": "step_1", "LEFT": "5:00"}, False, True, "stopped 300 s before the time limit in pack (exit status 75)"),
    ({"SAVES": "step_1", "LEFT": "0:00"}, False, True, "stopped 0 s before the time limit in pack"),
    ({"SAVES": "step_1", "LEFT": "5:01"}, True, False, "packed in"),
    ({"SAVES": "step_1", "LEFT": "2-00:00:09"}, True, False, "packed in"),
    ({"SAVES": "step_1", "LEFT": "UNLIMITED"}, True, False, "packed in"),
    ({"SAVES": "step_1", "LEFT": "5:00", "SQUEUE": "3"}, True, False, "packed in"),
    ({"LEFT": "5:00"}, True, False, "packed in"),  # the run had ended before: a new start would not have more time
])
def test_what_follows_training_does_not_die_with_the_time_limit(saved, tmp_path, environment, packs, requeued, line):
    calls = run_script(saved("experts"), tmp_path, **ARRAY, **environment)
    assert any("pack" in call for call in calls) is packs
    assert (tmp_path / "requeued").exists() is requeued
    assert line in log_of(tmp_path)


def test_any_other_end_has_a_line(saved, tmp_path):
    run_script(saved("experts").replace("\ntrain expert", "\nexit 7\ntrain expert"), tmp_path, **ARRAY)
    assert f"ended with exit status 7; see {tmp_path}/out/logs/experts/notes." in log_of(tmp_path)


def test_options_are_quoted_for_who_reads_them(saved, tmp_path):
    script = saved("experts", "slurm.srun_options={container-image: 'a $HOME', x: true}", "slurm.options.comment=$A b")
    assert sbatch_options(script)["comment"] == '"$A b"'
    train, _ = run_script(script, tmp_path, **ARRAY)
    assert "--container-image=a $HOME" in train and "--x" in train


def test_text_reaches_training_as_it_stands(saved, tmp_path, launch_file):
    launch_file.write_text(launch_file.read_text().replace("    notes:", "    '007':", 1))
    script = saved("experts", f"out={tmp_path}/out #1")
    (tmp_path / "out").rename(tmp_path / "out #1")
    train, _ = run_script(script, tmp_path, **ARRAY)
    overrides = [word for word in train[train.index("expert") + 1:] if "=" in word]
    config = load_config(TrainConfig, preset="tiny", overrides=overrides)
    assert (config.out, config.expert.name) == (f"{tmp_path}/out #1/experts/007/run", "007")
    assert config.anchor == f"{tmp_path}/out #1/anchor"


def test_functions_know_the_exit_status_of_a_run_that_was_asked_to_stop(capsys, launch_file):
    assert f"{REQUEUE_STATUS} | 138 | 143) requeue" in scripts(dry_run(capsys, launch_file))["functions.sh"]


def test_setup_and_odd_names_reach_the_shell_as_they_are(saved, tmp_path, launch_file):
    text = launch_file.read_text().replace("code.jsonl]", "\"it's $HOME; .jsonl\"]", 1)
    launch_file.write_text(text)
    script = saved("experts", "slurm.setup=['export WHO=me', 'module() { :; }']")
    assert "\nexport WHO=me\nmodule() { :; }\n" in script
    (embed, *_) = run_script(script, tmp_path, SLURM_ARRAY_JOB_ID="1", SLURM_ARRAY_TASK_ID="0")
    assert embed[embed.index("embed") + 1] == "it's $HOME; .jsonl"


@pytest.mark.parametrize("overrides, message", [
    (["slurm.partitoin=x"], "unknown option 'slurm.partitoin' (did you mean 'partition'?)"),
    (["expert={}"], "unknown option 'expert' (did you mean 'experts'?)"),
    (["experts.each.code.document=[x]"], "unknown option 'experts.each.code.document' (did you mean 'documents'?)"),
    (["experts.slurm.node=3"], "unknown option 'experts.slurm.node' (did you mean 'nodes'?)"),
    (["slurm=[x]"], "the command line: slurm = ['x']: expected a mapping of options"),
    (["experts.slurm={options: [x]}"], "experts.slurm.options = ['x']: expected a mapping of options"),
    (["slurm={time: 43200}"], "slurm.time = 43200: expected text in quotes, as '12:00:00'"),
    (["slurm.time=43200"], "slurm.time = '43200' (job anchor): expected hours:minutes:seconds"),
    (["slurm.time=00:10:00"], "slurm.time = '00:10:00' (job anchor) is 600 s: expected more than twice "
                              "slurm.warn_seconds = 300"),
    (["slurm.warn_seconds=64800"], "slurm.time = '1-12:00:00' (job anchor) is 129600 s: expected more than"),
    (["experts.slurm={time: '12:30'}", "slurm.warn_seconds=400"], "(job experts) is 750 s: expected more than"),
    (["merge.slurm.time=7200"], "merge.slurm.time = 7200: expected text in quotes"),
    (["slurm.time=soon"], "slurm.time = 'soon' (job anchor): expected hours:minutes:seconds"),
    (["slurm.nodes=two"], "slurm.nodes: Value 'two' of type 'str' could not be converted to Integer"),
    (["merge.slurm.nodes=two"], "merge.slurm.nodes: Value 'two'"),
    (["experts.slurm.nodes=0"], "slurm.nodes = 0 (job experts): expected at least 1"),
    (["slurm.options.partition=x"], "slurm.options.partition: expected slurm.partition instead"),
    (["slurm.options.array=0-3"], "slurm.options.array: expected no such option, the scripts set it"),
    (["slurm.srun_options={export: NONE}"], "slurm.srun_options.export: expected no such option"),
    (["slurm.options.clusters=x"], "slurm.options.clusters: expected no such option, the scripts set it"),
    (["slurm.options={gpus-per-task: 1}"], "slurm.options.gpus-per-task: expected slurm.gpus_per_node instead"),
    (["slurm.options={-p: x}"], "'-p' is not the long name of an option"),
    (["slurm.options={comment: 'a \"b'}"], "expected text without quotation marks"),
    (["slurm.options={mem: [1]}"], "slurm.options.mem = [1]: expected one value"),
    (["published=anchor"], "expected either a section anchor or published="),
    (["anchor=null"], "expected either a section anchor or published="),
    (["anchor.documents=[]"], "anchor.documents is empty"),
    (["experts.each.code.domain_vector=x.npz"], "experts.each.code: expected either documents or domain_vector"),
    (["experts=null"], "merge.packages is empty and there is no section experts"),
    (["out=runs/${x}"], "Interpolation key 'x' not found"),
    (["out=runs/%j"], "out = 'runs/%j': expected a path without %"),
    (["anchor.preset=tinny"], "anchor: unknown preset 'tinny' (did you mean 'tiny'?)"),
    (["anchor.options=[]"], "anchor: data.train has no value"),
    (["experts.options=[optimizer.lrr=1]"], "experts.each.code: the command line: unknown option 'optimizer.lrr'"),
    (["experts.config=[/nowhere.yaml]"], "experts.each.code: /nowhere.yaml does not exist"),
    (["slurm.nodes=3"], "anchor: global_batch_size = "),
    (["anchor.options=['data.train=[x]', parallel.tensor=3]"], "anchor: parallel.tensor = 3"),
    (["experts.slurm={nodes: 1, tasks_per_node: 3}"], "experts.each.code: global_batch_size = "),
    (["embed_arguments=[--public, x]"], "embed_arguments: --public compares with a published anchor, which is for "
                                        "experts alone: expected it in experts.embed_arguments"),
    (["experts.each.code.options=['data.train=[x]', expert.router_window=8]"],
     "expert.router_window = 1, and 8 for code: expected the same for all experts of a model"),
    (["experts.options=[global_batch_size=32, stop_after=3]"], "stop_after = 3: a job ends by its time limit"),
])
def test_what_is_refused(capsys, launch_file, overrides, message):
    assert message in refused(capsys, launch_file, *overrides)


def test_the_example_of_the_help_is_valid(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = EXAMPLE.partition("has all of it):\n")[2].partition("\noptions of")[0]
    (tmp_path / "launch.yaml").write_text(text)
    (tmp_path / "expert.yaml").write_text("global_batch_size: 64\n")
    assert '"$out"/experts/code/package' in dry_run(capsys, tmp_path / "launch.yaml")


def test_names_of_experts_are_checked(capsys, launch_file):
    launch_file.write_text(launch_file.read_text().replace("    code:", "    'a b':", 1))
    assert "'a b'" in refused(capsys, launch_file)


def test_files_that_are_no_launch_are_refused(capsys, tmp_path):
    assert "nowhere.yaml does not exist" in refused(capsys, tmp_path / "nowhere.yaml")
    path = tmp_path / "launch.yaml"
    for text, message in (("a: [", "is not valid YAML"), ("- a", "expected a mapping of options at the top"),
                          ("out: x", "expected at least one of the sections"),
                          ("out: x\npublished: x\nexperts: {each: {}}", "experts.each is empty"),
                          ("published: x\nmerge: {packages: [x]}", "out has no value")):
        path.write_text(text)
        assert message in refused(capsys, path)


def test_without_slurm_nothing_is_written(capsys, launch_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", str(launch_file)]) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_where_slurm_is_missing_its_tests_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "sbatch").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = unavailable()
    assert reason.startswith("no Slurm here (munged, slurmctld, slurmd, srun,")
    assert reason.endswith("on Debian: slurmctld slurmd slurm-client munge")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def publish(path: Path) -> None:
    """Save a published anchor of random weights, of the sizes of the preset tiny."""
    card = ModelCard("moe", replace(ModelConfig(), num_experts=1, top_k=1), [ExpertRecord(PUBLIC)])
    save_model(random_model(card, 0), path, "hf")


INPUTS = ("public/a.jsonl", "data/public.bin", "data/public.idx", "code.jsonl", "data/code.bin", "data/code.idx",
          "notes.npz", "data/notes.bin", "data/notes.idx", "code_valid.jsonl")


@pytest.mark.parametrize("gone, message", [
    ("public/a.jsonl", "anchor.documents: public/*.jsonl does not exist; expected a file or a pattern"),
    ("data/public.idx", "anchor: data.train: data/public.idx does not exist"),
    ("code.jsonl", "experts.each.code.documents: code.jsonl does not exist"),
    ("data/code.bin", "experts.each.code: data.train: data/code.bin does not exist"),
    ("notes.npz", "experts.each.notes.domain_vector = notes.npz does not exist"),
    ("code_valid.jsonl", "merge.domains.code: code_valid.jsonl does not exist"),
    ("package", "merge.packages: package does not exist"),
    ("", "sbatch refused"),
])
def test_what_no_job_makes_must_be_there(capsys, launch_file, tmp_path, monkeypatch, gone, message):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, *INPUTS, "package/manifest.json", "tools/sbatch")
    (tmp_path / "tools" / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "tools" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:{os.environ['PATH']}")
    if gone:
        (tmp_path / gone).rename(tmp_path / "gone")
    command = ["launch", str(launch_file), "merge.packages=[package]"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flexolmo: {message}") and error.count("\n") == 1
    assert (tmp_path / "out").exists() is (not gone)
    assert main([*command, "--dry-run"]) == 0
    notes = capsys.readouterr().err
    assert notes.startswith(f"a launch would be refused now: {message}") if gone else not notes


def test_layouts_are_checked_against_the_anchor(capsys, launch_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = "experts.options=[global_batch_size=32, parallel.tensor=8, parallel.sequence=true]"
    assert "experts.each.code: model.num_attention_heads = 4 cannot be split over parallel.tensor = 8" in refused(
        capsys, launch_file, wrong)  # against the anchor's options
    right = "anchor.options=['data.train=[x]', global_batch_size=32, model.num_attention_heads=8, " \
            "model.num_query_groups=8, model.vocab_size=264]"
    assert "code" in dry_run(capsys, launch_file, wrong, right)
    assert "anchor: parallel.pipeline = 8 does not divide model.num_layers" in refused(
        capsys, launch_file, "anchor.options=['data.train=[x]', global_batch_size=32, parallel.pipeline=8]")
    published = ["anchor=null", "published=anchor"]
    assert "code" in dry_run(capsys, launch_file, wrong, *published)  # not there: nothing to compare with
    publish(tmp_path / "anchor")
    assert "experts.each.code: model.num_attention_heads = 4 cannot be split over" in refused(
        capsys, launch_file, wrong, *published)
    assert "expert.ffn_hidden_size = 99999: expected 1 to the anchor's" in refused(
        capsys, launch_file, "experts.options=[global_batch_size=32, expert.ffn_hidden_size=99999]", *published)
    assert "experts.each.code: data.seq_length = 99999: expected at most" in refused(
        capsys, launch_file, "experts.options=[global_batch_size=32, data.seq_length=99999]", *published)


@pytest.mark.parametrize("code, out, error, message", [
    (1, "", "slurm_load_jobs error: Unable to contact slurm controller", "squeue does not say whether job 17 (anchor)"),
    (1, "", "slurm_load_jobs error: Invalid job id specified", None),
    (0, "COMPLETED", "", None),
    (0, "RUNNING", "", "job 17 (anchor) of an earlier launch into the same folder is still RUNNING"),
])
def test_whether_an_earlier_launch_is_over(tmp_path, monkeypatch, code, out, error, message):
    tool = tmp_path / "squeue"
    tool.write_text(f"#!/bin/bash\necho {out}; echo '{error}' >&2; exit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "jobs.json").write_text('{"anchor": {"job": "17"}}')
    with pytest.raises(FlexOlmoError) if message else nullcontext() as raised:
        _check_ended(tmp_path / "jobs.json")
    assert message is None or str(raised.value).startswith(message)


def test_a_refused_script_is_reported_with_what_was_submitted(capsys, launch_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, *INPUTS)
    tool = tmp_path / "sbatch"
    tool.write_text('#!/bin/bash\nif [[ $* = *anchor.sbatch ]]; then echo 17; else echo "no such" >&2; exit 1; fi\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["launch", str(launch_file)]) == 2
    error = capsys.readouterr().err
    assert f"sbatch refused {tmp_path}/out/slurm/experts.sbatch: no such" in error
    assert "already submitted, to be cancelled with scancel: anchor 17" in error


def test_only_what_is_missing_is_submitted(capsys, launch_file, tmp_path):
    out = tmp_path / "out"
    publish(out / "anchor")
    (out / "experts" / "code" / "package").mkdir(parents=True)
    parts = scripts(dry_run(capsys, launch_file))
    assert "anchor.sbatch" not in parts and sbatch_options(parts["experts.sbatch"])["array"] == "1"
    assert "sbatch --parsable " + shlex.quote(f"{out}/slurm/experts.sbatch") in parts["to be submitted with"]
    (out / "merged").mkdir()
    assert "merged exists already, without notes, still to be trained" in refused(capsys, launch_file)
    (out / "experts" / "notes" / "package").mkdir(parents=True)
    assert list(scripts(dry_run(capsys, launch_file))) == ["functions.sh", "merge.sbatch", "to be submitted with"]
    (out / "evaluation").mkdir()
    assert main(["launch", str(launch_file)]) == 0
    assert capsys.readouterr().out == f"{out}: everything is there already\n"
