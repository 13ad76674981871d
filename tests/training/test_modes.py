"""The other kinds of run, schedules, accumulation and data-parallel training."""

import json
import os
import subprocess
import sys

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.domain.vector import load_vector
from tests.training.runs import SMALL


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("anchor", ["anchor", "anchor_run", None])
def test_dense(world, tmp_path, anchor):
    start = [f"anchor={world}/{anchor}"] if anchor else []
    assert main(["train", "dense", *SMALL, f"out={tmp_path}/run", f"data.train=[{world}/own]", *start]) == 0
    assert open_model(tmp_path / "run").card.kind == "dense"
    # From the anchor the first loss is that of a trained model, else that of a uniform guess over 264 ids.
    assert (rows(tmp_path / "run")[0]["loss"] < 5.4) == (anchor is not None)


@pytest.mark.parametrize("anchor", ["anchor", None])
def test_moe(world, tmp_path, anchor):
    start = [f"anchor={world}/{anchor}"] if anchor else []
    options = [
        *SMALL,
        "model.num_experts=3",
        "model.top_k=2",
        f"out={tmp_path}/run",
        f"data.train=[0.5,{world}/own,0.5,{world}/public]",
    ]
    assert main(["train", "moe", *options, *start]) == 0
    model = open_model(tmp_path / "run")
    assert model.card.kind == "moe" and model.card.expert_names == ["public", "expert_1", "expert_2"]
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_accumulation_gives_the_losses_of_one_large_batch(world, tmp_path):
    for name, size in (("one", 4), ("four", 1)):
        assert (
            main(
                [
                    "train",
                    "anchor",
                    *SMALL,
                    f"out={tmp_path}/{name}",
                    f"data.train=[{world}/own]",
                    f"micro_batch_size={size}",
                ]
            )
            == 0
        )
    for one, four in zip(rows(tmp_path / "one"), rows(tmp_path / "four"), strict=True):
        # Sums in another order: a few units in the last place of fp32, grown over six steps.
        assert one["loss"] == pytest.approx(four["loss"], rel=2e-5)


@pytest.mark.parametrize(
    "style, options, expected",
    [
        ("cosine", [], [0.0, 0.5, 1.0, 0.854, 0.5, 0.146]),
        ("linear", [], [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [], [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("WSD", ["optimizer.lr_wsd_decay_iters=2"], [0.0, 0.5, 1.0, 1.0, 1.0, 0.5]),
    ],
)
def test_schedules(world, tmp_path, style, options, expected):
    assert (
        main(
            [
                "train",
                "anchor",
                *SMALL,
                f"out={tmp_path}/run",
                f"data.train=[{world}/own]",
                "optimizer.lr=1",
                "optimizer.lr_warmup_iters=2",
                f"optimizer.lr_decay_style={style}",
                *options,
            ]
        )
        == 0
    )
    assert [row["lr"] for row in rows(tmp_path / "run")] == pytest.approx(expected, abs=1e-3)


def test_an_uncoordinated_owner_trains_a_dense_copy_and_packs_its_ffns(world, expert_options, tmp_path, capsys):
    assert main(expert_options(tmp_path / "run", "expert.coordination=false")) == 0
    run = open_model(tmp_path / "run")
    assert run.card.kind == "dense" and run.card.anchor_digest
    pack = ["pack", f"{tmp_path}/run", f"{tmp_path}/package"]
    assert main(pack) == 2
    assert "cannot be packed" in capsys.readouterr().err
    vector = ["--domain-vector", f"{world}/own.npz", "--name", "own", "--anchor", f"{world}/anchor"]
    assert main([*pack, *vector]) == 0
    assert main(["merge", "--anchor", f"{world}/anchor", f"{tmp_path}/package", "--out", f"{tmp_path}/merged"]) == 0
    merged = open_model(tmp_path / "merged")
    for layer in range(2):
        ours, theirs = f"model.layers.{layer}.mlp.experts.1.up_proj.weight", f"model.layers.{layer}.mlp.up_proj.weight"
        assert merged.tensors[ours].read().equal(run.tensors[theirs].read())
        row = merged.tensors[f"model.layers.{layer}.mlp.gate.weight"].read()[1]
        assert row.equal(torch.from_numpy(load_vector(world / "own.npz").row(layer)))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["optimizer.use_distributed_optimizer=true"],
        ["parallel.tensor=2"],
        ["parallel.tensor=2", "parallel.sequence=true"],
    ],
    ids=["data", "distributed optimizer", "tensor", "sequence"],
)
def test_two_processes_give_the_losses_of_one(expert_options, tmp_path, options):
    assert main(expert_options(tmp_path / "one")) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "flexolmo_megatron.train",
    ]
    result = subprocess.run(
        [*command, *expert_options(tmp_path / "two", *options)[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        # The same sums in another order.
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        assert one["z_loss"] == pytest.approx(two["z_loss"], rel=1e-4)
    one, two = open_model(tmp_path / "one"), open_model(tmp_path / "two")
    assert one.tensors.keys() == two.tensors.keys()


@pytest.mark.parametrize(
    "mode, options, message",
    [
        (
            "anchor",
            ["optimizer.lr_decay_style=step"],
            "optimizer.lr_decay_style = 'step': expected one of cosine, linear, constant, WSD",
        ),
        ("anchor", ["optimizer.lr=-1"], "optimizer.lr = -1.0: expected a finite number above 0"),
        ("anchor", ["train_iters=0"], "train_iters = 0: expected at least 1"),
        ("anchor", ["parallel.tensor=2"], "does not divide the number of processes, 1"),
        (
            "anchor",
            ["model.num_attention_heads=5"],
            "model.num_attention_heads = 5 does not divide model.hidden_size = 32",
        ),
        ("anchor", ["anchor=x"], "an anchor starts from random weights"),
        ("moe", [], "model.num_experts = 0: expected 2 or more for `train moe`"),
        ("moe", ["model.num_experts=2", "model.top_k=3"], "model.top_k = 3: expected 1 to model.num_experts = 2"),
        ("anchor", ["modle.num_layers=2"], "unknown option 'modle' (did you mean 'model'?)"),
        ("anchor", ["optimizer.lr_warmup_iters=9"], "optimizer.lr_warmup_iters = 9: expected 0 to train_iters - 1 = 5"),
    ],
)
def test_bad_input(world, tmp_path, capsys, mode, options, message):
    assert main(["train", mode, *SMALL, f"out={tmp_path}/run", f"data.train=[{world}/own]", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
