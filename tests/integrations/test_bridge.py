"""The Megatron-Bridge plugin, in Bridge's own environment (bridge_runs.py): conversion, training, packing, loading."""

import importlib.util
import json
import os
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
from tests.distributed import free_ports
from tests.random_models import SIZES, random_model, tensors_of
from tests.training import runs

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-bridge" / "bin" / "python"
needs_bridge = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-bridge; run: make .venv-bridge/.installed")


@pytest.fixture
def in_bridge(tmp_path):
    """Run a task of bridge_runs.py in one process, or in several; returns what the first reports."""

    def run(*arguments, ranks=1):
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        (port,) = free_ports(1)
        processes = []
        for rank in range(ranks):
            variables = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                             OMP_NUM_THREADS=1)
            command = [PYTHON, "-W", "ignore", ROOT / "tests/integrations/bridge_runs.py",
                       report if rank == 0 else tmp_path / f"report{rank}", *arguments]
            processes.append(subprocess.Popen(
                list(map(str, command)), env={**os.environ, **{key: str(value) for key, value in variables.items()}},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path))
        outputs = [process.communicate(timeout=600)[0] for process in processes]
        assert not any(process.returncode for process in processes), outputs[0][-4000:]
        return json.loads(report.read_text())

    return run


def save_for_transformers(model, folder):
    """A Hugging Face directory with a tokenizer: Bridge copies one, and refuses directories without."""
    save_model(model, folder, "hf")
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": vocabulary}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def same_tensors(one, other):
    first, second = tensors_of(open_model(one)), tensors_of(open_model(other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@needs_bridge
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind, experts", [("moe", (3, 2)), ("dense", ())])
def test_models_go_through_auto_bridge_and_back(tmp_path, in_bridge, kind, experts, ranks):
    # Two query groups for four heads, RoPE base 500,000.
    model = random_model(kind, *experts, sizes=replace(SIZES, vocab_size=264))
    save_for_transformers(model, tmp_path / "source")
    report = in_bridge("convert", tmp_path / "source", tmp_path / "back", ranks=ranks)
    assert same_tensors(tmp_path / "source", tmp_path / "back")
    assert report["rotary_base"] == 500_000
    if ranks == 1:
        assert report["difference"] < 2e-4 < report["largest"]
        assert report["config"]["rope_theta"] == 500_000 and report["config"]["num_key_value_heads"] == 2


@needs_bridge
def test_a_merged_model_with_biases_is_loaded(tmp_path, in_bridge):
    save_model(random_model("moe", 3, 2, bias=True), tmp_path / "merged", "megatron")
    report = in_bridge("load", tmp_path / "merged")
    assert report["difference"] < 2e-4
    assert report["experts"] == ["public", "code", "math"]


@needs_bridge
def test_an_owners_run_is_that_of_flexolmo_train(tmp_path, in_bridge, monkeypatch):
    world = runs.make_world(tmp_path)
    ours = runs.expert_options(world, tmp_path / "ours")
    assert main(ours) == 0
    report = in_bridge("train", "expert", *runs.expert_options(world, tmp_path / "theirs")[2:], "--",
                       "train.train_iters=6", "logger.log_interval=1")
    expected = [step["loss"] for step in runs.metrics(tmp_path / "ours") if "loss" in step]
    assert len(expected) == 6
    assert report["losses"] == pytest.approx(expected, abs=1e-5)
    # 2 layers with three matrices of 32 x 48, a row and a bias; nothing of the anchor.
    assert report["buffers"] == 2 * (3 * 32 * 48 + 32 + 1)
    assert report["frozen"] > 0
    assert all(".mlp.expert." in name or ".mlp.router." in name for name in report["in optimizer"])
    assert len(report["in optimizer"]) == 2 * 4

    card = tmp_path / "theirs" / "iter_0000006" / "flexolmo.json"
    written = card.read_text()
    card.unlink()  # as after a run that was killed
    other = runs.expert_options(world, tmp_path / "theirs", "expert.name=other")[2:]
    assert in_bridge("train", "expert", *other)["refused"].startswith(
        f"{card.parent} belongs to another run: its experts is ['public', 'own'], this run's is ['public', 'other']")
    assert json.loads(card.read_text()) == json.loads(written)

    package = tmp_path / "package"
    assert main(["pack", str(tmp_path / "theirs"), str(package)]) == 0
    assert main(["verify", str(package), "--anchor", f"{world}/anchor"]) == 0
    assert main(["merge", "--anchor", f"{world}/anchor", str(package), "--out", f"{tmp_path}/merged"]) == 0
    assert in_bridge("load", tmp_path / "merged")["difference"] < 2e-4


@needs_bridge
def test_the_example_prints_what_its_readme_shows(tmp_path):
    run = subprocess.run([PYTHON, "-W", "ignore", ROOT / "examples/bridge/run.py", tmp_path / "out"],
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "exported -> Megatron -> back: the same to the last bit"
    shown = (ROOT / "examples/bridge/README.md").read_text()
    for line in run.stdout.splitlines():
        assert not line.startswith("$ flexolmo") or line in shown


@needs_bridge
def test_options_that_bridge_has_not_are_refused(in_bridge):
    assert in_bridge("train", "expert", "out=x", "data.train=[y]", "optimizer.router_lr=0.1")["refused"] == (
        "optimizer.router_lr = 0.1: not available in Megatron-Bridge; expected no value, or `flexolmo train`")


def test_sizes_and_rope_base_are_read_from_what_this_transformers_loads(tmp_path):
    # What the bridge reads; .venv has transformers 5.x, where rope_theta is no attribute, and .venv-bridge 4.57.
    model = random_model("moe", 3, 2)
    save_model(model, tmp_path / "source", "hf")
    assert parse_config(AutoConfig.from_pretrained(tmp_path / "source").to_dict(), "") == (model.card.model, "moe")


@pytest.mark.skipif(importlib.util.find_spec("megatron.bridge") is not None, reason="Megatron-Bridge is installed here")
def test_without_bridge_one_sentence_says_how_to_install_it():
    with pytest.raises(FlexOlmoError, match=r"^megatron-bridge is not installed; run: pip install 'megatron-bridge=="):
        import flexolmo_megatron.integrations.bridge  # noqa: F401
