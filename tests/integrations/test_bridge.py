"""The Megatron-Bridge plugin, in Bridge's own environment: conversion, training, packing, loading.

Starting Bridge takes longer than what it does here, so three launches do everything: ``first``, then ``second`` with
what came of that, and ``sharded``, of two processes.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.huggingface_config import parse_config
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.freezing import ROUTER, TRAINED_BY_OWNER
from tests.distributed import run_distributed
from tests.integrations.bridge_runs import perform
from tests.random_models import SIZES, random_model, tensors_of
from tests.training import runs

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-bridge" / "bin" / "python"
needs_bridge = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-bridge; run: make .venv-bridge/.installed")

GQA = replace(SIZES, vocab_size=264)
MHA = replace(GQA, num_query_groups=GQA.num_attention_heads)
ROPE = replace(GQA, rotary_base=12_345.0)
MODELS = {"moe": ("moe", (3, 2), GQA), "dense": ("dense", (), GQA), "moe MHA": ("moe", (3, 2), MHA),
          "dense MHA": ("dense", (), MHA)}


def save_for_transformers(model, folder):
    """A Hugging Face directory with a tokenizer: Bridge copies one, and refuses directories without."""
    save_model(model, folder, "hf")
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": vocabulary}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def leave_out(folder, *keys):
    """Take keys out of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in keys}))


def router_options(world, out):
    return ["train", "router", f"merged={world}/merged", f"data.train=[{world}/public]",
            f"data.proxies.own=[{world}/own]", "optimizer.lr_warmup_iters=1", *runs.SMALL[7:], f"out={out}"]


def in_bridge(ranks, tasks):
    return run_distributed(perform, ranks, tasks, python=PYTHON, timeout=600)[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What runs.py makes, and Hugging Face directories of MODELS."""
    world = runs.make_world(tmp_path_factory.mktemp("world"))
    for name, (kind, experts, sizes) in MODELS.items():
        save_for_transformers(random_model(kind, *experts, sizes=sizes), world / "hf" / name)
    save_for_transformers(random_model("dense", sizes=ROPE), world / "hf" / "of transformers 5")
    leave_out(world / "hf" / "of transformers 5", "rope_theta")
    return world


@pytest.fixture(scope="module")
def first(world):
    """Conversions, an owner's run and a stopped one, an anchor's, and what is refused."""
    save_model(random_model("moe", 3, 2, bias=True), world / "with biases", "megatron")

    def expert(out, *options):
        return "train", "expert", runs.expert_options(world, world / out, *options)[2:]

    anchor = [*runs.SMALL, f"out={world}/bridge_anchor", f"data.train=[{world}/public]"]
    return in_bridge(1, {
        **{path.name: ("convert", path, world / "back" / path.name) for path in (world / "hf").iterdir()},
        "with biases": ("load", world / "with biases"),
        "expert": expert("bridge_expert"),
        "stopped": (*expert("stopped"), "train.exit_interval=3", "logger.log_interval=1"),
        "option": expert("x", "optimizer.router_lr=0"),
        "size": (*expert("x"), "model.hidden_size=64"),
        "anchor": ("train", "anchor", anchor),
    })


@pytest.fixture(scope="module")
def second(world, first):
    """The stopped run goes on, other runs may not; the expert is merged, and the router tuned."""
    # As after a run that was killed.
    (world / "stopped" / "iter_0000003" / "flexolmo.json").unlink()
    other = open_model(world / "anchor").card.model
    save_model(random_model("moe", 1, 1, sizes=other), world / "other anchor", "hf")
    assert main(["pack", f"{world}/bridge_expert", f"{world}/package"]) == 0
    assert main(["verify", f"{world}/package", "--anchor", f"{world}/anchor"]) == 0
    assert main(["merge", "--anchor", f"{world}/anchor", f"{world}/package", "--out", f"{world}/merged"]) == 0

    def again(*options):
        return "train", "expert", runs.expert_options(world, world / "stopped", *options)[2:]

    return in_bridge(1, {
        "name": again("expert.name=other"),
        "anchor": again(f"anchor={world}/other anchor", "expert.random_row=true"),
        "resumed": again(),
        "merged": ("load", world / "merged"),
        "router": ("train", "router", router_options(world, world / "bridge_router")[2:]),
    })


@pytest.fixture(scope="module")
def sharded(world):
    """Two processes that share matrices."""
    expert = runs.expert_options(world, world / "sharded_expert", "parallel.tensor=2")[2:]
    return in_bridge(2, {
        "moe": ("convert", world / "hf" / "moe", world / "sharded" / "moe"),
        "dense": ("convert", world / "hf" / "dense", world / "sharded" / "dense"),
        "expert": ("train", "expert", expert),
    })


def losses(run):
    """Of every step of a run of ``flexolmo train``."""
    return [step["loss"] for step in runs.metrics(run) if "loss" in step]


def same_tensors(one, other):
    first, second = tensors_of(open_model(one)), tensors_of(open_model(other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@needs_bridge
@pytest.mark.parametrize("name", MODELS)
def test_models_go_through_auto_bridge_and_back(world, first, name):
    assert same_tensors(world / "hf" / name, world / "back" / name)
    assert first[name]["difference"] < 2e-4 < first[name]["largest"]
    config, sizes = first[name]["config"], MODELS[name][2]
    assert (config["rope_theta"], config["num_key_value_heads"]) == (500_000, sizes.num_query_groups)


@needs_bridge
@pytest.mark.parametrize("name", ["moe", "dense"])
def test_two_processes_convert_the_same(world, sharded, name):
    assert same_tensors(world / "hf" / name, world / "sharded" / name)


@needs_bridge
def test_a_rope_base_where_transformers_4_does_not_look_is_found(world, first):
    assert first["of transformers 5"]["config"]["rope_theta"] == 12_345
    assert open_model(world / "back" / "of transformers 5").card.model == ROPE


@needs_bridge
def test_merged_models_with_biases_are_loaded(first, second):
    assert first["with biases"]["difference"] < 2e-4
    assert first["with biases"]["experts"] == ["public", "code", "math"]
    assert second["merged"]["difference"] < 2e-4
    assert second["merged"]["experts"] == ["public", "own"]


@needs_bridge
def test_an_owners_run_is_that_of_flexolmo_train(world, first):
    assert main(runs.expert_options(world, world / "ours")) == 0
    report = first["expert"]
    # Bridge adds up token losses in fp32, our loop in fp64.
    assert len(report["losses"]) == 6 and report["losses"] == pytest.approx(losses(world / "ours"), rel=1e-6)
    # 2 layers with three matrices of 32 x 48, a row and a bias; nothing of the anchor.
    assert report["buffers"] == 2 * (3 * 32 * 48 + 32 + 1)
    assert report["frozen"] > 0
    assert all(TRAINED_BY_OWNER.search(name) for name in report["in optimizer"])
    assert len(report["in optimizer"]) == 2 * 4


@needs_bridge
def test_an_owners_run_resumes_exactly_and_with_its_own_checkpoints_alone(world, first, second):
    assert first["stopped"]["exit status"] == 0
    assert first["stopped"]["losses"] + second["resumed"]["losses"] == first["expert"]["losses"]
    assert same_tensors(world / "bridge_expert", world / "stopped")
    refusal = f"{world}/stopped/iter_0000003 belongs to another run: its "
    assert second["name"]["refused"].startswith(
        f"{refusal}experts is ['public', 'own'], this run's is ['public', 'other']; name a new folder")
    assert second["anchor"]["refused"].startswith(f"{refusal}anchor digest is ")


@needs_bridge
def test_two_processes_train_the_same(world, first, sharded):
    assert sharded["expert"]["losses"] == pytest.approx(first["expert"]["losses"], rel=1e-5)
    one = tensors_of(open_model(world / "bridge_expert"))
    for name, tensor in tensors_of(open_model(world / "sharded_expert")).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-4, msg=name)


@needs_bridge
def test_an_anchors_run_is_that_of_flexolmo_train(world, first):
    assert first["anchor"]["losses"] == pytest.approx(losses(world / "anchor_run"), rel=1e-6)
    theirs, mine = open_model(world / "bridge_anchor"), open_model(world / "anchor_run")
    assert theirs.card == mine.card
    theirs, mine = tensors_of(theirs), tensors_of(mine)
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, mine[name], rtol=1e-4, atol=1e-5, msg=name)


@needs_bridge
def test_router_tuning_is_that_of_flexolmo_train(world, second):
    assert main(router_options(world, world / "router")) == 0
    report = second["router"]
    assert report["losses"] == pytest.approx(losses(world / "router"), rel=1e-6)
    assert report["frozen"] > 0 and all(ROUTER.search(name) for name in report["in optimizer"])
    theirs, mine = open_model(world / "bridge_router"), open_model(world / "router")
    assert theirs.card.row_sets == mine.card.row_sets
    theirs, mine = tensors_of(theirs), tensors_of(mine)
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, mine[name], rtol=1e-4, atol=1e-5, msg=name)


@needs_bridge
def test_what_bridge_has_not_is_refused(first):
    assert first["option"]["refused"] == (
        "optimizer.router_lr = 0.0: not available in Megatron-Bridge; expected no value, or `flexolmo train`")
    assert first["size"]["refused"] == "model.hidden_size = 64: expected 32, as the model's card says"


@needs_bridge
def test_the_example_prints_what_its_readme_shows(tmp_path):
    run = subprocess.run([PYTHON, "-W", "ignore", ROOT / "examples/bridge/run.py", tmp_path / "out"],
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "exported -> Megatron -> back: the same to the last bit"
    shown = (ROOT / "examples/bridge/README.md").read_text()
    for line in run.stdout.splitlines():
        assert not line.startswith("$ flexolmo") or line in shown


@pytest.mark.parametrize("left_out", ["rope_theta", "rope_parameters"])
def test_the_rope_base_is_read_from_either_place(tmp_path, left_out):
    # What the bridge reads; .venv has transformers 5, which itself writes rope_parameters alone, 4.57 rope_theta.
    save_model(random_model("dense", sizes=ROPE), tmp_path / "source", "hf")
    leave_out(tmp_path / "source", left_out)
    assert parse_config(AutoConfig.from_pretrained(tmp_path / "source").to_dict(), "") == (ROPE, "dense")


@pytest.mark.skipif(importlib.util.find_spec("megatron.bridge") is not None, reason="Megatron-Bridge is installed here")
@pytest.mark.parametrize("found, sentence", [(None, "megatron-bridge is not installed; run: pip install 'mega"),
                                             ("0.4.0", "megatron-bridge 0.4.0 is installed, tested is 0.3.1; run: ")])
def test_a_missing_or_another_bridge_is_one_sentence_with_the_install_line(monkeypatch, found, sentence):
    if found is not None:
        monkeypatch.setattr(importlib.metadata, "version", lambda package: found)
    with pytest.raises(FlexOlmoError, match=f"^{re.escape(sentence)}"):
        import flexolmo_megatron.integrations.bridge  # noqa: F401
