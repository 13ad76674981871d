"""Router tuning: what trains and what does not, resuming, layouts, leave-one-out sets, and what is refused."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.config.card import RowSet
from flexolmo_megatron.convert.megatron import open_megatron
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.convert.rows import is_row, untuned, use_rows
from flexolmo_megatron.errors import REQUEUE_STATUS
from flexolmo_megatron.exchange.digest import model_digest
from tests.distributed import run_distributed
from tests.random_models import SIZES, lazy_model, random_model, tensors_of
from tests.training.runs import metrics, write_documents

TEXTS = {
    "public": ["the", "cat", "sat", "on", "a", "mat"],
    "code": ["def", "return", "for", "x", "y", "="],
    "math": ["one", "plus", "two", "is", "prime"],
    "other": ["entirely", "different", "proxies", "of", "math"],
}


def merged_model(bias: bool = True):
    """Experts public, code and math, of which 2 are active; the public bias is 0, as in every merge."""
    model = random_model("moe", 3, 2, bias=bias, sizes=replace(SIZES, vocab_size=264))
    tensors = tensors_of(model)
    for name, value in tensors.items():
        if name.endswith("gate.bias"):
            value[0] = 0
    return lazy_model(model.card, tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    for name, words in TEXTS.items():
        write_documents(folder / f"{name}.jsonl", words)
        assert main(["data", f"{folder}/{name}.jsonl", "--out", f"{folder}/{name}", "--workers", "1"]) == 0
    save_model(merged_model(), folder / "merged", "megatron")
    return folder


def options(folder: Path, out: Path, *more: str) -> list[str]:
    """The command line of a run on the proxies of both owners."""
    return [
        "train",
        "router",
        f"merged={folder}/merged",
        f"data.train=[{folder}/public]",
        f"data.proxies.code=[{folder}/code]",
        f"data.proxies.math=[{folder}/math]",
        "data.seq_length=32",
        "global_batch_size=4",
        "micro_batch_size=2",
        "train_iters=6",
        "eval_iters=1",
        "optimizer.lr=5e-2",
        "optimizer.lr_warmup_iters=1",
        f"out={out}",
        *more,
    ]


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A finished run with a set for each owner who is left out."""
    valid = [f"data.valid=[{folder}/code]", "eval_interval=1"]
    assert main(options(folder, folder / "run", "--leave-one-out", *valid)) == 0
    return folder / "run"


def rows_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in model.tensors.items() if is_row(name)}


def test_only_rows_and_biases_change(folder, run):
    before, after = tensors_of(open_model(folder / "merged")), tensors_of(open_model(run))
    assert before.keys() == after.keys()
    for name, value in after.items():
        if name.endswith("gate.weight"):
            assert (value != before[name]).any(dim=-1).all(), f"a row of {name} has not moved"
        elif name.endswith("gate.bias"):
            assert value[0] == 0 and (value[1:] != before[name][1:]).all()
        else:
            assert torch.equal(value, before[name]), name
    losses = [row["valid_loss"] for row in metrics(run)]
    assert losses[-1] < losses[0]


def test_the_tuned_model_keeps_the_untuned_one(folder, run):
    merged, tuned = open_model(folder / "merged"), open_model(run)
    assert untuned(tuned).card == merged.card
    assert model_digest(untuned(tuned)) == model_digest(merged) != model_digest(tuned)


def test_what_each_set_depends_on_is_recorded(run):
    sets = open_model(run).card.row_sets
    assert [(rows.name, rows.experts, rows.proxies) for rows in sets] == [
        ("tuned", ["code", "math"], ["code", "math"]),
        ("without-code", ["math"], ["math"]),
        ("without-math", ["code"], ["code"]),
        ("untuned", [], []),
    ]
    assert sets[0].training == {"tokens": 6 * 4 * 32, "steps": 6, "lr": 5e-2, "seed": 1234}
    assert sets[-1] == RowSet("untuned")


def test_it_says_what_it_checked(folder, tmp_path, capsys):
    assert main(options(folder, tmp_path / "run", "train_iters=2")) == 0
    printed, digest = capsys.readouterr().out, model_digest(open_model(folder / "merged"))
    assert f"all but router rows and biases unchanged, bit by bit; merged model's digest {digest}" in printed
    assert f"rows tuned, untuned; all but the tuned rows is bitwise that of the merged model, digest {digest}\n" in (
        printed
    )


def test_checkpoints_hold_rows_and_biases_alone(folder, run):
    checkpoint = run / "checkpoints" / "step_00000006"
    held = open_megatron(checkpoint)
    assert held.card.kind == "router" and held.card.merged_digest == model_digest(open_model(folder / "merged"))
    assert all(map(is_row, held.tensors)) and len(held.tensors) == 4
    stored = torch.distributed.checkpoint.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert all(".router." in key for key in stored if "decoder" in key or "embedding" in key), sorted(stored)


def test_no_buffer_state_or_weight_gradient_for_anything_else(folder, tmp_path, monkeypatch):
    from flexolmo_megatron.training import loop
    from flexolmo_megatron.training.gemms import count_gemms

    seen = {}

    def step(self, iterators):
        counted = count_gemms(lambda: seen.update(row=real(self, iterators)))
        seen.update(state=self.state, gemms=counted)
        return seen["row"]

    real = loop.Loop._step
    monkeypatch.setattr(loop.Loop, "_step", step)
    assert main(options(folder, tmp_path / "run", "train_iters=2", "micro_batch_size=4")) == 0
    (chunk,) = seen["state"].chunks
    rows = 2 * (3 * 32 + 3)
    assert sum(p.numel() for p in chunk.parameters() if p.requires_grad) == rows
    assert sum(int(buffer.numel_unpadded) for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)) == rows
    moments = [s for part in getattr(seen["state"].optimizer, "chained_optimizers", [seen["state"].optimizer])
               if part.optimizer for s in part.optimizer.state.values()]
    assert sum(s["exp_avg"].numel() for s in moments) == rows
    # A weight's gradient is a product over tokens: outputs x tokens x inputs. All others are over a model's dimension.
    weights = {(64, 32), (32, 32), (96, 32), (48, 32), (32, 48), (264, 32)}
    products = {tuple(map(int, name.split(" x "))) for name in seen["gemms"].names}
    over_tokens = {(m, n) for m, k, n in products if k not in (3, 32, 48, 64, 96, 264)}
    assert over_tokens.isdisjoint(weights | {(n, m) for m, n in weights}), over_tokens
    assert (3, 32) in over_tokens, "the rows' own gradients are products over 128 tokens"


def test_resumed_equals_unbroken(folder, run, tmp_path):
    for more in (["stop_after=4"], ["stop_after=4"], ["stop_after=7"], []):
        assert not (tmp_path / "run" / "model").exists()
        assert main(options(folder, tmp_path / "run", "--leave-one-out", *more)) == 0
    assert len(metrics(tmp_path / "run")) == 6
    ours, theirs = open_model(tmp_path / "run"), open_model(run)
    assert ours.card == theirs.card
    for rows in theirs.card.row_sets:
        assert model_digest(use_rows(ours, rows.name)) == model_digest(use_rows(theirs, rows.name))


def test_sets_that_a_finished_model_lacks(folder, tmp_path, capsys):
    assert main(options(folder, tmp_path / "run", "train_iters=2")) == 0
    capsys.readouterr()
    assert main(options(folder, tmp_path / "run", "train_iters=2", "--leave-one-out")) == 2
    assert ("model is written already, with the rows tuned, untuned and without without-code, without-math: move it "
            "away and repeat the command") in capsys.readouterr().err
    assert not (tmp_path / "run" / "without").exists()
    (tmp_path / "run" / "model").rename(tmp_path / "model")
    assert main(options(folder, tmp_path / "run", "train_iters=2", "--leave-one-out")) == 0
    assert main(options(folder, tmp_path / "run", "train_iters=2")) == 0
    names = [rows.name for rows in open_model(tmp_path / "run").card.row_sets]
    assert names == ["tuned", "without-code", "without-math", "untuned"]


def test_a_run_that_has_not_ended_is_no_model_yet(folder, tmp_path, capsys):
    assert main(options(folder, tmp_path / "run", "stop_after=1")) == 0
    assert main(["inspect", str(tmp_path / "run")]) == 2
    assert "holds router rows alone: the tuned model is in the folder 'model' of its run" in capsys.readouterr().err


def test_a_set_without_an_owner_has_seen_nothing_of_that_owner(folder, run, tmp_path):
    """Another expert, row, bias and proxies of math: the rows without math are bitwise the same for all others."""
    merged = merged_model()
    tensors = tensors_of(merged)
    for name, value in tensors.items():
        if ".experts.2." in name:
            value.mul_(-3)
        elif is_row(name):
            value[2] = 0.7
    save_model(lazy_model(merged.card, tensors), tmp_path / "merged", "megatron")
    changed = [f"merged={tmp_path}/merged", f"data.proxies.math=[{folder}/other]"]
    assert main(options(folder, tmp_path / "run", "--leave-one-out", *changed)) == 0
    ours, theirs = open_model(run), open_model(tmp_path / "run")
    for name, same in (("without-math", True), ("tuned", False)):
        mine, other = rows_of(use_rows(ours, name)), rows_of(use_rows(theirs, name))
        assert all(torch.equal(mine[key][:2], other[key][:2]) for key in mine) == same, name


def test_a_lone_owner_gets_no_set_without_proxies(folder, tmp_path):
    one = options(folder, tmp_path / "run", "--leave-one-out", "train_iters=2")
    one.remove(f"data.proxies.math=[{folder}/math]")
    assert main(one) == 0
    assert [rows.name for rows in open_model(tmp_path / "run").card.row_sets] == ["tuned", "without-math", "untuned"]


def test_bf16_ends_with_rows_in_the_models_type(folder, tmp_path):
    assert main(options(folder, tmp_path / "run", "train_iters=2", "bf16=true")) == 0
    assert {tensor.dtype for tensor in open_model(tmp_path / "run").tensors.values()} == {torch.float32}


def test_tuning_again_starts_from_the_untuned_rows(folder, run, tmp_path):
    assert main(options(folder, tmp_path / "run", f"merged={run}", "--leave-one-out")) == 0
    assert model_digest(open_model(tmp_path / "run")) == model_digest(open_model(run))


def test_public_data_and_owners_in_equal_shares():
    from flexolmo_megatron.config.train import DataConfig, RouterTrainConfig
    from flexolmo_megatron.training.run import _blend

    data = DataConfig(train=["p", "q"], proxies={"code": [3, "c", 1, "d"], "math": ["m"]})
    blend = _blend(RouterTrainConfig(out="x", data=data))
    assert blend[1::2] == ["p", "q", "c", "d", "m"]
    assert blend[::2] == pytest.approx([1 / 6, 1 / 6, 1 / 4, 1 / 12, 1 / 3])


def test_defaults_of_its_own():
    from flexolmo_megatron.config.train import RouterTrainConfig, TrainConfig

    config = RouterTrainConfig()
    assert (config.optimizer.lr, config.optimizer.lr_warmup_iters, config.moe_z_loss_coeff) == (1e-4, 100, 0)
    assert (TrainConfig().optimizer.lr, TrainConfig().moe_z_loss_coeff) == (9e-4, 1e-3)


def tuned_in(folder: str, out: str, *more: str) -> None:
    from flexolmo_megatron.runtime.setup import prepare

    prepare()
    assert main(options(Path(folder), Path(out), *more)) == 0


@pytest.mark.parametrize("layout", [
    ["parallel.tensor=2", "parallel.sequence=true"],
    ["parallel.pipeline=2"],
    ["micro_batch_size=1"],
], ids=["tensor and expert-tensor", "pipeline", "data"])
def test_two_processes_tune_the_same_rows(folder, run, tmp_path, layout):
    run_distributed(tuned_in, 2, str(folder), str(tmp_path / "run"), *layout)
    ours, theirs = rows_of(open_model(tmp_path / "run")), rows_of(open_model(run))
    for name, value in theirs.items():  # sums in another order; 6 steps of 5e-2
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-3)


def test_expert_parallel(folder, tmp_path):
    save_model(random_model("moe", 4, 2), tmp_path / "merged", "megatron")
    more = [f"merged={tmp_path}/merged", "train_iters=3", "--leave-one-out"]
    run_distributed(tuned_in, 2, str(folder), str(tmp_path / "two"), *more, "parallel.expert=2", "micro_batch_size=1")
    assert main(options(folder, tmp_path / "one", *more)) == 0
    ours, theirs = open_model(tmp_path / "two"), open_model(tmp_path / "one")
    sets = ["tuned", "without-code", "without-math", "without-law", "untuned"]
    assert [rows.name for rows in ours.card.row_sets] == sets
    for rows in theirs.card.row_sets:
        mine = rows_of(use_rows(ours, rows.name))
        for name, value in rows_of(use_rows(theirs, rows.name)).items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=2e-3)


def test_no_room_is_made_for_experts_that_take_no_part(folder, tmp_path, monkeypatch):
    """On a GPU the tokens' new order is made by a kernel that is told how many rows there will be."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher

    def dispatch(self, *args):
        rows, probabilities = real(self, *args)
        seen.add((len(rows), self.num_out_tokens))
        return rows, probabilities

    real, seen = Dispatcher.dispatch_preprocess, set()
    monkeypatch.setattr(Dispatcher, "dispatch_preprocess", dispatch)
    save_model(random_model("moe", 3, 3, sizes=replace(SIZES, vocab_size=264)), tmp_path / "merged", "megatron")
    assert main(options(folder, tmp_path / "run", f"merged={tmp_path}/merged", "train_iters=1",
                        "optimizer.lr_warmup_iters=0", "--leave-one-out")) == 0
    assert seen == {(3 * 64, 3 * 64), (2 * 64, 2 * 64)}


@pytest.mark.parametrize(("changes", "message"), [
    (["merged=null"], "merged has no value: router tuning needs a merged model; set merged=PATH"),
    (["merged=nowhere"], "nowhere does not exist"),
    (["anchor=x"], "anchor = x: expected no value for `train router`"),
    (["data.public=[x]", "data.public_share=0.5"], "data.public = ['x']: expected no value for `train router`"),
    (["data.proxies.mth=[x]"], "data.proxies: unknown expert 'mth' (did you mean 'math'?): expected one of code, math"),
    (["data.proxies.public=[x]"], "data.proxies: unknown expert 'public'"),
    (["data.proxies.math=[]"], "data.proxies.math is empty: expected the prefix of a data set"),
    (["data.proxie.math=[x]"], "unknown option 'data.proxie' (did you mean 'proxies'?)"),
    (["optimizer.lr_warmup_iters=6"], "optimizer.lr_warmup_iters = 6: expected 0 to train_iters - 1 = 5"),
])
def test_bad_input_is_one_sentence(folder, tmp_path, capsys, changes, message):
    assert main(options(folder, tmp_path / "run", *changes)) == 2
    assert message in capsys.readouterr().err


def test_wrong_models_and_no_proxies_are_refused(folder, tmp_path, capsys):
    save_model(random_model("moe", 1, 1), tmp_path / "anchor", "megatron")
    assert main(options(folder, tmp_path / "run", f"merged={tmp_path}/anchor")) == 2
    assert "is a moe model with 1 experts: expected a merged model, with the public" in capsys.readouterr().err
    none = [word for word in options(folder, tmp_path / "run") if "proxies" not in word]
    assert main(none) == 2
    assert "data.proxies is empty: expected proxies of at least one owner" in capsys.readouterr().err


def test_options_of_router_tuning_are_refused_elsewhere(folder, tmp_path, capsys):
    assert main(["train", "moe", f"data.train=[{folder}/public]", f"out={tmp_path}/run", "--leave-one-out"]) == 2
    assert "are options of `train router`: expected none of them for `train moe`" in capsys.readouterr().err


def test_a_run_of_another_merged_model_or_with_other_proxies_is_not_resumed(folder, tmp_path, capsys):
    assert main(options(folder, tmp_path / "run", "stop_after=1")) == 0
    other = random_model("moe", 3, 2, bias=True, seed=5, sizes=replace(SIZES, vocab_size=264))
    save_model(other, tmp_path / "other", "megatron")
    assert main(options(folder, tmp_path / "run", f"merged={tmp_path}/other")) == 2
    error = capsys.readouterr().err
    assert "belongs to another run: its merged model's digest is" in error
    assert model_digest(open_model(folder / "merged")) in error
    assert main(options(folder, tmp_path / "run", f"data.proxies.math=[{folder}/other]")) == 2
    assert "data.proxies = " in capsys.readouterr().err
    assert json.loads((tmp_path / "run/checkpoints/step_00000001/flexolmo.json").read_text())["kind"] == "router"


def test_a_signal_during_a_later_set_marks_the_whole_run(folder, run, tmp_path, monkeypatch):
    from flexolmo_megatron.training import loop

    def step(self, iterators):
        if self.run.name == "code" and self.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, iterators)

    real = loop.Loop._step
    monkeypatch.setattr(loop.Loop, "_step", step)
    assert main(options(folder, tmp_path / "run", "--leave-one-out")) == REQUEUE_STATUS
    assert (tmp_path / "run" / "requeue").read_text() == "SIGTERM at step 3\n"
    monkeypatch.undo()
    assert main(options(folder, tmp_path / "run", "--leave-one-out")) == 0
    assert not (tmp_path / "run" / "requeue").exists()
    ours, theirs = open_model(tmp_path / "run"), open_model(run)
    assert model_digest(use_rows(ours, "without-code")) == model_digest(use_rows(theirs, "without-code"))
