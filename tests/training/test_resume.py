"""A stopped and resumed run repeats an unbroken one bit by bit; see test_restarts.py for those that are killed."""

import json
import shutil

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.exchange.digest import model_digest

COMPARED = ("step", "loss", "grad_norm", "lr", "z_loss", "mean_drift", "valid_loss")


def essence(rows):
    return [{name: row[name] for name in COMPARED if name in row} for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        ["optimizer.router_lr=1e-2"],
        ["optimizer.use_distributed_optimizer=true"],
        ["bf16=true"],
        ["optimizer.lr_decay_style=WSD", "optimizer.lr_wsd_decay_iters=3"],
        ["expert.domain_vector={world}/discriminant.npz", "expert.drift_coeff=0.1"],
    ],
    ids=["fp32, two learning rates", "distributed optimizer", "bf16", "WSD", "penalty on drift"],
)
def test_resumed_equals_unbroken(world, expert_options, metrics, tmp_path, options):
    options = [*(option.format(world=world) for option in options), "eval_interval=3", "optimizer.lr_warmup_iters=2"]
    assert main(expert_options(tmp_path / "unbroken", *options)) == 0
    assert main(expert_options(tmp_path / "broken", *options, "stop_after=1")) == 0
    assert main(expert_options(tmp_path / "broken", *options, "stop_after=3")) == 0
    assert main(expert_options(tmp_path / "broken", *options)) == 0
    unbroken, broken = metrics(tmp_path / "unbroken"), metrics(tmp_path / "broken")
    assert essence(broken) == essence(unbroken)
    assert len(unbroken) == 6
    assert model_digest(open_model(tmp_path / "broken")) == model_digest(open_model(tmp_path / "unbroken"))


@pytest.mark.parametrize("bf16", [False, True])
def test_the_distributed_optimizer_is_switched_on_and_off(expert_options, metrics, tmp_path, bf16):
    """Bit by bit, but for the norm of the gradients: its sum is taken in another order. So without clipping."""
    options = [f"bf16={bf16}", "optimizer.router_lr=1e-2", "optimizer.clip_grad=0"]
    assert main(expert_options(tmp_path / "unbroken", *options)) == 0
    for distributed in (False, True, True, False):
        more = [f"optimizer.use_distributed_optimizer={distributed}", "stop_after=1"]
        assert main(expert_options(tmp_path / "run", *options, *more)) == 0
    assert main(expert_options(tmp_path / "run", *options, "optimizer.use_distributed_optimizer=true")) == 0
    rows = [essence(metrics(tmp_path / name)) for name in ("run", "unbroken")]
    norms = [[row.pop("grad_norm") for row in run] for run in rows]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert model_digest(open_model(tmp_path / "run")) == model_digest(open_model(tmp_path / "unbroken"))


@pytest.mark.parametrize("option", ["bf16=false", "bf16=true", "optimizer.use_distributed_optimizer=true"])
def test_a_run_that_has_only_skipped_steps_is_resumed(expert_options, metrics, tmp_path, monkeypatch, option):
    """Adam has no moments then."""
    from flexolmo_megatron.training import run

    finalize = run._finalize_gradients

    def poisoned(state, chunks, *args, **options):
        if state.step == 0:
            chunks[0].buffers[0].grad_data[3] = float("nan")
        finalize(state, chunks, *args, **options)

    monkeypatch.setattr(run, "_finalize_gradients", poisoned)
    assert main(expert_options(tmp_path / "unbroken", option)) == 0
    assert main(expert_options(tmp_path / "broken", option, "stop_after=1")) == 0
    assert main(expert_options(tmp_path / "broken", option)) == 0
    rows = metrics(tmp_path / "broken")
    assert essence(rows) == essence(metrics(tmp_path / "unbroken"))
    assert ["skipped" in row for row in rows] == [True, *[False] * 5]


def test_a_kept_number_of_checkpoints(expert_options, tmp_path):
    assert main(expert_options(tmp_path / "run", "save_interval=1", "keep=2")) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000005",
        "step_00000006",
    ]


def test_a_finished_run_says_so(expert_options, tmp_path, capsys):
    assert main(expert_options(tmp_path / "run")) == 0
    assert main(expert_options(tmp_path / "run")) == 0
    assert "has all of its 6 steps already" in capsys.readouterr().out


def test_a_run_of_another_kind_and_a_foreign_folder_are_refused(world, expert_options, tmp_path, capsys):
    options = expert_options(f"{world}/anchor_run")
    assert main(options) == 2
    assert "holds a run of `train anchor`, not of `train expert`" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert main(expert_options(tmp_path)) == 2
    assert "is a folder with other things in it" in capsys.readouterr().err
    assert main(expert_options(tmp_path / "notes.txt")) == 2
    assert "notes.txt is a file; name a new folder" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_samples_or_another_type_are_refused(expert_options, tmp_path, capsys):
    assert main(expert_options(tmp_path / "run", "stop_after=1")) == 0
    for option, message in (
        ("train_iters=7", "train_iters = 7: the run in"),
        ("data.seq_length=16", "data.seq_length = 16: the run in"),
        ("bf16=true", "bf16 = True: the run in"),
    ):
        assert main(expert_options(tmp_path / "run", option)) == 2
        error = capsys.readouterr().err
        assert message in error and "can only be resumed with that" in error
    assert main(expert_options(tmp_path / "run")) == 0


def test_other_documents_or_another_vector_are_refused(world, expert_options, tmp_path, capsys):
    for name in ("own.bin", "own.idx", "own.json"):
        shutil.copy(world / name, tmp_path / name)
    options = f"data.train=[{tmp_path}/own]"
    assert main(expert_options(tmp_path / "run", options, "stop_after=1")) == 0
    vector = ["embed", "--anchor", f"{world}/anchor", f"{world}/own.jsonl", "--out", f"{tmp_path}/other.npz"]
    assert main([*vector, "--documents", "7"]) == 0
    assert main(expert_options(tmp_path / "run", options, f"expert.domain_vector={tmp_path}/other.npz")) == 2
    assert "belongs to another run: its router rows' origin is" in capsys.readouterr().err
    assert main(expert_options(tmp_path / "run", options, "stop_after=1")) == 0
    for name in ("own.bin", "own.idx", "own.json"):
        shutil.copy(world / name.replace("own", "public"), tmp_path / name)
    assert main(expert_options(tmp_path / "run", options)) == 2
    assert f"{tmp_path}/own has changed since the run in" in capsys.readouterr().err


def test_a_vector_that_was_made_anew_is_noticed(world, expert_options, tmp_path, capsys):
    shutil.copy(world / "own.npz", tmp_path / "own.npz")
    options = f"expert.domain_vector={tmp_path}/own.npz"
    assert main(expert_options(tmp_path / "run", options, "stop_after=1")) == 0
    vector = ["embed", "--anchor", f"{world}/anchor", f"{world}/own.jsonl", "--out", f"{tmp_path}/own.npz"]
    assert main([*vector, "--scale", "2"]) == 0
    assert main(expert_options(tmp_path / "run", options)) == 2
    assert f"{tmp_path}/own.npz has changed since the run in" in capsys.readouterr().err
    (tmp_path / "run" / "data.json").write_text("")
    assert main(expert_options(tmp_path / "run", options)) == 2
    assert "data.json cannot be read as what a run is made from" in capsys.readouterr().err


def test_metrics_of_steps_that_are_done_again_are_dropped(expert_options, metrics, tmp_path):
    assert main(expert_options(tmp_path / "run", "stop_after=2")) == 0
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "loss": 0.0}) + "\n")
    assert main(expert_options(tmp_path / "run")) == 0
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[2]["loss"] > 0
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)


def test_a_run_that_broke_off_leaves_nothing_for_the_next_one(expert_options, metrics, tmp_path, monkeypatch):
    """Megatron adds up the routers' losses in one place per process."""
    from flexolmo_megatron.training import run

    def fail(*_, **__):
        raise KeyboardInterrupt

    assert main(expert_options(tmp_path / "first", "train_iters=1")) == 0
    with monkeypatch.context() as patched:
        patched.setattr(run, "_finalize_gradients", fail)
        assert main(expert_options(tmp_path / "broken", "train_iters=1")) != 0
    assert main(expert_options(tmp_path / "second", "train_iters=1")) == 0
    assert essence(metrics(tmp_path / "second")) == essence(metrics(tmp_path / "first"))
