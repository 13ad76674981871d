"""Ranks are killed, stopped or starved: a run goes on from its last intact checkpoint as if nothing had happened."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.exchange.digest import model_digest
from tests.training.ranks import ROOT, Launcher

COMPARED = ("step", "loss", "grad_norm", "lr", "z_loss", "valid_loss", "skipped")
PAIR = ["parallel.tensor=1", "global_batch_size=4", "micro_batch_size=2"]
SAVE_INTERVAL = 4


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.close()


def essence(rows):
    return [{name: row[name] for name in COMPARED if name in row} for row in rows]


def wait_until(condition, launcher, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline and None in launcher.poll(), launcher.output()
        time.sleep(0.002)


def checkpoints(run):
    """Steps of the folders that look complete, each checked byte for byte against its record."""
    steps = []
    for folder in sorted((run / "checkpoints").glob("step_*")):
        for name, recorded in json.loads((folder / "integrity.json").read_text())["files"].items():
            content = (folder / name).read_bytes()
            assert len(content) == recorded["bytes"], name
            assert hashlib.sha256(content).hexdigest() == recorded["sha256"], name
        steps.append(int(folder.name[5:]))
    return steps


def steps_done(run):
    """The last step in metrics.jsonl, read while it is being written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_twenty_kills(launcher, expert_options, metrics, tmp_path):
    """Of either rank: five during the start, five between or within steps, ten while a checkpoint is being written, of
    these five in the background."""
    options = [*PAIR, "train_iters=140", f"save_interval={SAVE_INTERVAL}", "optimizer.router_lr=1e-2"]
    began = time.monotonic()
    launcher.start(expert_options(tmp_path / "unbroken", *options))
    wait_until((tmp_path / "unbroken" / "metrics.jsonl").exists, launcher)
    startup = time.monotonic() - began
    assert launcher.wait() == [0, 0], launcher.output()
    run = tmp_path / "killed"
    randomness = random.Random(20)
    resumed = 0
    for kill in range(20):
        before, background = checkpoints(run), kill % 4 == 1
        arguments = expert_options(run, *options, f"async_save={background}".lower())
        launcher.start(arguments, fault="slow_saves" if kill % 2 else "")
        if kill % 2:
            known = set((run / "checkpoints").glob(".step_*"))
            wait_until(lambda known=known: set((run / "checkpoints").glob(".step_*")) - known, launcher)
        elif kill % 4:
            goal = max(before, default=0) + randomness.randrange(1, 3 * SAVE_INTERVAL)
            wait_until(lambda goal=goal: steps_done(run) >= goal, launcher)
        else:
            ends, going = time.monotonic() + randomness.uniform(0, startup), max(before, default=0) + SAVE_INTERVAL
            wait_until(
                lambda ends=ends, going=going: time.monotonic() > ends or steps_done(run) > going, launcher
            )
        time.sleep(randomness.uniform(0, 0.05))
        os.kill(launcher.pids[randomness.randrange(2)], signal.SIGKILL)
        time.sleep(randomness.uniform(0, 0.05))
        assert -signal.SIGKILL in launcher.kill(), "the run was over before it could be killed"
        if "resuming from" in launcher.output():
            assert f"step_{before[-1]:08d} at step {before[-1]}\n" in launcher.output()
            resumed += 1
        # A save in the background is waited for when the next one is due, so that one more interval may be lost.
        lost = steps_done(run) - max(checkpoints(run), default=0)
        assert lost <= (2 if background else 1) * SAVE_INTERVAL
    assert resumed >= 12
    launcher.start(expert_options(run, *options))
    assert launcher.wait() == [0, 0], launcher.output()
    assert essence(metrics(run)) == essence(metrics(tmp_path / "unbroken"))
    assert model_digest(open_model(run)) == model_digest(open_model(tmp_path / "unbroken"))
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_signal_to_one_rank_stops_all(launcher, expert_options, metrics, tmp_path, asynchronous):
    options = [*PAIR, "train_iters=24", "save_interval=5", f"async_save={asynchronous}", "keep=9"]
    launcher.start(expert_options(tmp_path / "unbroken", *options))
    assert launcher.wait() == [0, 0], launcher.output()
    run, stops = tmp_path / "run", []
    for rank, number in ((1, signal.SIGUSR1), (0, signal.SIGTERM)):
        launcher.start(expert_options(run, *options), fault="slow_steps")
        goal = steps_done(run) + 3
        wait_until(lambda goal=goal: steps_done(run) >= goal, launcher)
        os.kill(launcher.pids[rank], number)
        assert launcher.wait() == [75, 75], launcher.output()
        stops.append(steps_done(run))
        assert checkpoints(run)[-1] == stops[-1]
        assert f"{number.name}: stopped after step {stops[-1]} of 24, which is saved" in launcher.output(rank)
        assert (run / "requeue").read_text() == f"{number.name} at step {stops[-1]}\n"
        assert "frozen parameters" not in launcher.output()  # their hash would take the time that is for saving
    assert 3 <= stops[0] < stops[1] < 24
    launcher.start(expert_options(run, *options))
    assert launcher.wait() == [0, 0], launcher.output()
    assert not (run / "requeue").exists()
    assert "frozen parameters unchanged" in launcher.output()
    assert essence(metrics(run)) == essence(metrics(tmp_path / "unbroken"))
    assert set(checkpoints(run)) == {5, 10, 15, 20, 24, *stops}
    assert model_digest(open_model(run)) == model_digest(open_model(tmp_path / "unbroken"))


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing(launcher, expert_options, metrics, tmp_path):
    """Skipping steps 2 and 3 leaves weights, moments and their count as after step 1, with either optimizer."""
    for name, more in (("plain", []), ("distributed", ["optimizer.use_distributed_optimizer=true"])):
        run, options = tmp_path / name, [*PAIR, *more, "optimizer.clip_grad=0", "save_interval=1", "keep=9"]
        launcher.start(expert_options(run, *options), fault="nan_gradient")
        assert launcher.wait() == [0, 0], launcher.output()
        assert "step 2 is skipped: a gradient is not finite on rank 1 (1 of this run so far)" in launcher.output()
        rows = metrics(run)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert ["skipped" in row for row in rows] == [False, True, True, False, False, False]
        assert all("grad_norm" not in row for row in rows[1:3]) and all(row["grad_norm"] > 0 for row in rows[3:])
        digests = [model_digest(open_model(run / "checkpoints" / f"step_{step:08d}")) for step in (1, 2, 3, 4)]
        assert digests[0] == digests[1] == digests[2] != digests[3]
        assert _moments(run, 1) == _moments(run, 3) != _moments(run, 4)
        assert open_model(run).card.training["tokens"] == 4 * 4 * 32


def _moments(run, step):
    """sha256 of every tensor of optimizer state in a checkpoint, by name."""
    import torch
    from megatron.core import dist_checkpointing

    folder = str(run / "checkpoints" / f"step_{step:08d}")
    names = [name for name in dist_checkpointing.load_tensors_metadata(folder) if name.startswith("optimizer")]
    assert names
    tensors = dist_checkpointing.load_plain_tensors(folder)
    return {name: hashlib.sha256(tensors[name].view(-1).view(torch.uint8).numpy()).hexdigest() for name in names}


def test_too_many_skipped_steps_end_the_run(launcher, expert_options, metrics, tmp_path):
    options = [*PAIR, "save_interval=1", "max_skipped_steps=2"]
    launcher.start(expert_options(tmp_path / "run", *options), fault="nan_loss")
    assert launcher.wait() == [2, 2], launcher.output()
    said = launcher.output()
    assert "step 4: the loss is not finite on rank 1, which makes 2 such steps in a row (max_skipped_steps = 2)" in said
    assert "Traceback" not in said
    assert checkpoints(tmp_path / "run") == [2, 3]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_stops_all_ranks_with_the_last_checkpoint_intact(launcher, expert_options, tmp_path, asynchronous):
    run = tmp_path / "run"
    options = [*PAIR, "stop_after=2", f"async_save={asynchronous}"]
    launcher.start(expert_options(run, *options))
    assert launcher.wait() == [0, 0], launcher.output()
    launcher.start(expert_options(run, *options), file_limit=20_000)  # enough for the log, not for a checkpoint
    assert launcher.wait() == [2, 2], launcher.output()
    for rank in range(2):
        error = launcher.output(rank)
        assert f"flexolmo: cannot write the checkpoint {run}/checkpoints/step_00000004: [Errno 27] File too" in error
        assert "earlier checkpoints are intact" in error and "Traceback" not in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert checkpoints(run) == [2]


def test_a_log_that_cannot_be_written_stops_all_ranks(launcher, expert_options, tmp_path):
    run = tmp_path / "run"
    launcher.start(expert_options(run, *PAIR, "stop_after=2"))
    assert launcher.wait() == [0, 0], launcher.output()
    log = run / "metrics.jsonl"
    log.write_text(json.dumps({"step": 1, "note": "x" * 8_000}) + "\n")  # larger than what else a start writes
    launcher.start(expert_options(run, *PAIR), file_limit=log.stat().st_size + 100)
    assert launcher.wait() == [2, 2], launcher.output()
    assert f"cannot write {run}/metrics.jsonl" in launcher.output(1)
    assert "Traceback" not in launcher.output(0) + launcher.output(1)
    assert checkpoints(run) == [2]


def _snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_what_one_rank_meets_all_ranks_say_and_the_run_stays_as_it_was(launcher, expert_options, tmp_path):
    run = tmp_path / "run"
    launcher.start(expert_options(run, *PAIR, "stop_after=2"))
    assert launcher.wait() == [0, 0], launcher.output()
    (run / "checkpoints" / f".step_00000003.{os.uname().nodename}.{2**22 - 1}.partial").mkdir()
    before = _snapshot(run)
    launcher.start(expert_options(run, *PAIR, "keep=7"), fault="fails_on_rank_1")
    assert launcher.wait() == [2, 2], launcher.output()
    for rank in range(2):
        assert "flexolmo: a tensor cannot be read on this node\n" in launcher.output(rank)
    launcher.start(expert_options(tmp_path, *PAIR))  # rank 0 alone looks at the folder
    assert launcher.wait() == [2, 2], launcher.output()
    assert "is a folder with other things in it" in launcher.output(1)
    assert _snapshot(run) == before and len(list((run / "checkpoints").iterdir())) == 2


PIPELINE = ["parallel.pipeline=2", "global_batch_size=4", "micro_batch_size=2"]


@pytest.mark.parametrize(
    ("fault", "statuses", "said"),
    [
        ("no_room_on_rank_1", [99, 99], ["RuntimeError: rank 1: RuntimeError: out of memory", "Error: out of memory"]),
        ("no_vector_on_rank_0", [99, 99], ["KeyError: 'vectors'", "RuntimeError: rank 0: KeyError: 'vectors'"]),
        ("no_vector_on_rank_1", [0, 0], ["frozen parameters unchanged", ""]),
    ],
)
def test_no_stage_of_a_pipeline_waits_for_one_that_cannot_start(
    launcher, expert_options, tmp_path, fault, statuses, said
):
    launcher.start(expert_options(tmp_path / "run", *PIPELINE, "stop_after=1"), fault=fault)
    assert launcher.wait(60) == statuses, launcher.output()
    for rank, text in enumerate(said):
        assert text in launcher.output(rank)


def test_a_signal_during_the_start_is_not_paid_for_with_a_step(launcher, expert_options, tmp_path):
    run = tmp_path / "run"
    for step in (0, 2):
        launcher.start(expert_options(run, *PAIR), fault="asked_to_stop_while_starting")
        assert launcher.wait() == [75, 75], launcher.output()
        said = f"SIGTERM: stopped before step {step + 1} of 6, with nothing new to save; the same command goes on"
        assert said in launcher.output(0) and said in launcher.output(1)
        assert (run / "requeue").read_text() == f"SIGTERM at step {step}\n"
        assert checkpoints(run) == [2] * bool(step) and steps_done(run) == step
        if not step:
            launcher.start(expert_options(run, *PAIR, "stop_after=2"))
            assert launcher.wait() == [0, 0], launcher.output()
            assert not (run / "requeue").exists()


def test_output_that_cannot_be_written_ends_no_run(launcher, expert_options, metrics, tmp_path):
    run = tmp_path / "run"
    launcher.start(expert_options(run, *PAIR, "log_interval=1"), fault="output_to_a_full_disk")
    assert launcher.wait() == [0, 0], launcher.output(1)
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6] and checkpoints(run) == [6]
    assert launcher.output(0) == ""


def _environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def test_elastic_restart(expert_options, metrics, tmp_path):
    """torchrun starts all ranks again after one of them has died; it does not once the run was asked to stop."""
    options = [*PAIR, "save_interval=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]

    def launch(run, **variables):
        return subprocess.run(
            [*torchrun, str(ROOT / "tests/training/dying.py"), *expert_options(run, *options)],
            env=_environment(**variables),
            capture_output=True,
            text=True,
            timeout=300,
        )

    died = launch(tmp_path / "died", DIE_AT_STEP="3", DIE_OF="SIGKILL")
    assert died.returncode == 0, died.stderr
    assert "step_00000002 at step 2" in died.stdout
    stopped = launch(tmp_path / "stopped", DIE_AT_STEP="3", DIE_OF="SIGUSR1")
    assert stopped.returncode == 1
    assert f"flexolmo: {tmp_path}/stopped was asked to stop; its next launch goes on with it" in stopped.stderr
    assert steps_done(tmp_path / "stopped") == 4 and (tmp_path / "stopped" / "requeue").exists()
    finished = launch(tmp_path / "stopped")
    assert finished.returncode == 0 and not (tmp_path / "stopped" / "requeue").exists(), finished.stderr
    assert essence(metrics(tmp_path / "died")) == essence(metrics(tmp_path / "stopped"))
    assert model_digest(open_model(tmp_path / "died")) == model_digest(open_model(tmp_path / "stopped"))
    launcher = Launcher(tmp_path)
    launcher.start(expert_options(tmp_path / "unbroken", *options))
    assert launcher.wait() == [0, 0], launcher.output()
    launcher.close()
    assert essence(metrics(tmp_path / "died")) == essence(metrics(tmp_path / "unbroken"))
