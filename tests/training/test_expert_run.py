"""An owner's run: what is frozen stays so and costs nothing, and what trains is all that is stored."""

import json

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.exchange.digest import model_digest


@pytest.fixture(scope="module")
def run(world, expert_options, tmp_path_factory):
    out = tmp_path_factory.mktemp("expert") / "run"
    assert main(expert_options(out)) == 0
    return out


def test_the_anchor_is_unchanged_and_named(world, run):
    card = open_model(run).card
    assert card.kind == "pair"
    assert card.anchor_path == f"{world}/anchor"
    assert card.anchor_digest == model_digest(open_model(world / "anchor"))
    assert card.expert_names == ["public", "own"]
    assert card.training == {"tokens": 6 * 4 * 32, "steps": 6, "lr": 5e-3, "seed": 1234}


def test_the_anchor_is_found_from_any_folder(world, expert_options, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    assert main(expert_options(tmp_path / "run", "anchor=anchor", "train_iters=1")) == 0
    monkeypatch.chdir(tmp_path)
    assert open_model("run").card.anchor_path == f"{world}/anchor"
    assert main(["generate", "run", "--prompt", "x", "--max-new-tokens", "1"]) == 0


def test_the_live_anchor_has_the_anchors_digest_after_training(world, expert_options, tmp_path):
    from flexolmo_megatron.config.load import load_config
    from flexolmo_megatron.config.train import TrainConfig
    from flexolmo_megatron.model.weights import live_model
    from flexolmo_megatron.training import checkpoint
    from flexolmo_megatron.training.run import train

    config = load_config(TrainConfig, overrides=expert_options(tmp_path / "run")[2:])
    seen = []
    save = checkpoint.begin_save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint,
            "begin_save",
            lambda run, state, *rest, **options: (seen.append(state), save(run, state, *rest, **options))[1],
        )
        train("expert", config)
    anchor = open_model(world / "anchor")
    (chunk,) = seen[0].chunks
    assert model_digest(live_model(chunk, anchor.card)) == model_digest(anchor)

    # No gradient buffer and no optimizer state for anything frozen, both for everything else.
    optimized = {id(p) for group in seen[0].optimizer.param_groups for p in group["params"]}
    frozen = [p for p in chunk.module.parameters() if not p.requires_grad]
    trained = [p for p in chunk.module.parameters() if p.requires_grad]
    assert len(frozen) == 1 + 1 + 1 + 2 * (4 + 2 + 2 + 1)
    assert len(trained) == 2 * (2 + 2)
    for parameter in frozen:
        assert parameter.grad is None
        assert not hasattr(parameter, "main_grad")
        assert id(parameter) not in optimized
    for parameter in trained:
        assert parameter.main_grad.shape == parameter.shape
        assert id(parameter) in optimized
    buffers = sum(buffer.grad_data.numel() for buffer in chunk.buffers)
    assert buffers == sum(p.numel() for p in trained)


def test_checkpoints_hold_only_what_trains(run):
    from torch.distributed.checkpoint import FileSystemReader

    (checkpoint,) = (run / "checkpoints").iterdir()
    keys = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    weights = {key for key in keys if not key.startswith("optimizer")}
    assert weights == {
        f"decoder.layers.{layer}.mlp.{name}"
        for layer in range(2)
        for name in ("expert.linear_fc1.weight", "expert.linear_fc2.weight", "router.row", "router.bias")
    }
    moments = {key for key in keys if key.startswith("optimizer")}
    assert {key.split(".", 3)[-1] for key in moments if "exp_avg_sq" in key} == weights


def test_the_expert_starts_as_the_anchor_and_its_row_as_the_domain_vector(world, expert_options, tmp_path):
    assert main(expert_options(tmp_path / "run", "optimizer.lr=1e-12", "train_iters=1")) == 0
    anchor, pair = open_model(world / "anchor"), open_model(tmp_path / "run")
    from flexolmo_megatron.domain.vector import load_vector

    rows = load_vector(world / "own.npz").vectors
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj", "down_proj"):
            torch.testing.assert_close(
                pair.tensors[f"{mlp}.experts.1.{name}.weight"].read(),
                anchor.tensors[f"{mlp}.experts.0.{name}.weight"].read(),
                rtol=0,
                atol=1e-9,
            )
        torch.testing.assert_close(
            pair.tensors[f"{mlp}.gate.weight"].read()[0], torch.from_numpy(rows[layer]), rtol=0, atol=1e-9
        )
        assert pair.tensors[f"{mlp}.gate.bias"].read().abs().item() <= 1e-9


def test_the_router_has_its_own_learning_rate(world, expert_options, tmp_path):
    options = ["optimizer.lr=1e-12", "optimizer.router_lr=1e-2", "train_iters=1"]
    assert main(expert_options(tmp_path / "run", *options)) == 0
    anchor, pair = open_model(world / "anchor"), open_model(tmp_path / "run")
    from flexolmo_megatron.domain.vector import load_vector

    moved = pair.tensors["model.layers.0.mlp.gate.weight"].read()[0] - torch.from_numpy(
        load_vector(world / "own.npz").row(0)
    )
    # AdamW's first step is the learning rate in every coordinate, up to epsilon.
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-2, atol=0)
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    torch.testing.assert_close(
        pair.tensors[name.format(1)].read(), anchor.tensors[name.format(0)].read(), rtol=0, atol=1e-9
    )


def test_rows_that_stay_do_not_count_in_the_gradients_norm(world, expert_options, metrics, tmp_path):
    norms = {}
    for rate in ("0", "1e-12"):
        assert main(expert_options(tmp_path / rate, f"optimizer.router_lr={rate}", "train_iters=1")) == 0
        norms[rate] = metrics(tmp_path / rate)[0]["grad_norm"]
    assert 0 < norms["0"] < norms["1e-12"]
    pair = open_model(tmp_path / "0")
    from flexolmo_megatron.domain.vector import load_vector

    vector = load_vector(world / "own.npz")
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        assert torch.equal(pair.tensors[f"{mlp}.gate.weight"].read()[0], torch.from_numpy(vector.row(layer)))
        assert not pair.tensors[f"{mlp}.gate.bias"].read().any()


@pytest.mark.parametrize("option, moved", [("expert.bias=false", False), ("expert.bias=true", True)])
def test_a_bias_only_where_asked_for(expert_options, tmp_path, option, moved):
    assert main(expert_options(tmp_path / "run", option, "train_iters=2")) == 0
    names = open_model(tmp_path / "run").tensors
    assert any(name.endswith("gate.bias") for name in names) == moved


def test_a_random_row_instead_of_a_vector(expert_options, tmp_path):
    options = [o for o in expert_options(tmp_path / "run", "expert.random_row=true") if "domain_vector" not in o]
    assert main(options) == 0
    assert open_model(tmp_path / "run").card.experts[1].router == {"embedder": "random", "documents": 0}


def test_a_narrower_expert(expert_options, tmp_path):
    assert main(expert_options(tmp_path / "run", "expert.ffn_hidden_size=16")) == 0
    pair = open_model(tmp_path / "run")
    assert pair.tensors["model.layers.0.mlp.experts.1.down_proj.weight"].shape == (32, 16)


def test_a_report_of_memory_is_printed(world, expert_options, tmp_path, capsys):
    assert main(expert_options(tmp_path / "run", "train_iters=1")) == 0
    text = capsys.readouterr().out
    trained = 2 * (3 * 32 * 48 + 32 + 1)
    frozen = 2 * 264 * 32 + 32 + 2 * (32 * 64 + 32 + 16 + 32 * 32 + 3 * 32 * 48 + 32 + 2 * 32)
    assert f"trainable parameters {trained:,}, frozen {frozen:,}; weights {4 * (trained + frozen):,} B" in text
    assert f"gradients {4 * trained:,} B" in text
    assert "frozen parameters unchanged, bit by bit" in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["anchor=/nowhere"], "/nowhere"),
        (["expert.name=public"], "public"),
        (["expert.name=../x"], "../x"),
        (["expert.name="], "name"),
        (["expert.domain_vector=/nowhere.npz"], "/nowhere.npz"),
        (["expert.ffn_hidden_size=64"], "expert.ffn_hidden_size = 64: expected 1 to the anchor's 48"),
        (["data.seq_length=64"], "data.seq_length = 64: expected at most model.max_position_embeddings = 32"),
        (["data.train=[/nowhere]"], "/nowhere"),
        (
            ["global_batch_size=3"],
            "global_batch_size = 3: expected a multiple of micro_batch_size = 2 times the 1 data-parallel processes",
        ),
    ],
)
def test_bad_input(expert_options, tmp_path, capsys, options, message):
    assert main(expert_options(tmp_path / "run", *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_an_unpublished_anchor_is_refused(world, expert_options, tmp_path, capsys):
    assert main(expert_options(tmp_path / "run", f"anchor={world}/anchor_run")) == 2
    assert "has no router row (kind dense, 0 experts): expected a published anchor" in capsys.readouterr().err


def test_a_vector_of_another_anchor_is_refused(world, expert_options, tmp_path, capsys):
    other = tmp_path / "other"
    small = [
        o
        for o in expert_options(other)[2:]
        if o.split("=")[0] not in ("anchor", "expert.name", "expert.domain_vector", "data.train")
    ]
    sizes = [
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.ffn_hidden_size=48",
        "model.num_attention_heads=4",
        "model.max_position_embeddings=32",
        "model.vocab_size=264",
    ]
    assert main(["train", "anchor", *sizes, *small, f"data.train=[{world}/public]", "seed=7"]) == 0
    assert main(["embed", f"{world}/own.jsonl", "--anchor", f"{other}", "--out", f"{tmp_path}/other.npz"]) == 0
    assert main(expert_options(tmp_path / "run", f"expert.domain_vector={tmp_path}/other.npz")) == 2
    assert "was made for another anchor" in capsys.readouterr().err


def test_results_are_json_lines_and_tensorboard(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "lr", "tokens_per_second", "z_loss"} <= set(rows[0])
    assert "valid_loss" in rows[-1]
    assert list((run / "tensorboard").glob("events.*"))
    assert rows[-1]["loss"] < rows[0]["loss"]
