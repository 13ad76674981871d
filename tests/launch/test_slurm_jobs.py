"""The scripts of `flexolmo launch` at work, with commands in place of Slurm's: what is started, logged and requeued."""

from pathlib import Path

import pytest

from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.errors import REQUEUE_STATUS
from tests.launch.launches import dry_run, run_script, sbatch_options, scripts

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
