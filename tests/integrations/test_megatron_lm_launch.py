"""Real launches through the pretrain() of the Megatron-LM checkout that the variable MEGATRON_LM names, over gloo."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.patches import change
from flexolmo_megatron.training.freezing import TRAINED_BY_OWNER
from tests.distributed import free_ports
from tests.random_models import tensors_of
from tests.training import runs

ROOT = Path(__file__).parent.parent.parent
TREE = Path(os.environ.get("MEGATRON_LM", ""))
COMPILED = any((TREE / "megatron" / "core" / "datasets").glob("helpers_cpp*.so"))
pytestmark = [
    pytest.mark.skipif("MEGATRON_LM" not in os.environ,
                       reason="set MEGATRON_LM to a checkout of Megatron-LM core_v0.16.1"),
    pytest.mark.skipif("MEGATRON_LM" in os.environ and not COMPILED,
                       reason="run `make -C megatron/core/datasets` in the checkout that MEGATRON_LM names"),
]

EXISTING = [
    # What a launch on CPUs needs: no fused kernels, no Transformer Engine.
    "--distributed-backend", "gloo", "--transformer-impl", "local", "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion", "--no-rope-fusion", "--no-persist-layer-norm", "--use-cpu-initialization",
    "--train-iters", "6", "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4",
    "--lr", "5e-3", "--min-lr", "0", "--lr-decay-style", "cosine", "--weight-decay", "0", "--adam-beta2", "0.95",
    "--clip-grad", "1.0", "--seed", "1234", "--num-workers", "0", "--eval-iters", "0", "--eval-interval", "1000",
    "--log-interval", "1", "--save-interval", "3",
]
"""The same settings as runs.SMALL."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trained and published anchor, data and a domain vector (see runs.py)."""
    return runs.make_world(tmp_path_factory.mktemp("world"))


def _launch(world, save, *options, processes=1, tree=TREE, expert=True):
    """Run the entry in place of pretrain_gpt.py; returns exit status, output of rank 0 and the report on gradients."""
    (port,) = free_ports(1)
    report = Path(f"{save}.json")
    path = ":".join(filter(None, [str(tree), str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = ["--flexolmo-anchor", f"{world}/anchor", "--flexolmo-expert", "own", "--flexolmo-domain-vector",
            f"{world}/own.npz", "--train-data-path", f"{world}/own"] if expert else []
    # This Python first: `make` in the checkout asks python3.
    environment = {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
                   "REPORT": str(report), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, ROOT / "tests/integrations/cpu_launch.py", *EXISTING, *ours, "--save", save, "--load",
               save, "--data-cache-path", f"{save}.cache", *options]
    started = []
    try:
        for rank in range(processes):
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(f"{save}.log{rank}", "wb") as log:
                started.append(subprocess.Popen(command, env=environment, cwd=save.parent, stdout=log,
                                                stderr=subprocess.STDOUT))
        status = started[0].wait(timeout=400)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return status, Path(f"{save}.log0").read_text(), json.loads(report.read_text()) if report.exists() else None


def _losses(output):
    """Losses as Megatron-LM logs them. Its second line is the mean of the first two steps."""
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
    return [losses[0], 2 * losses[1] - losses[0], *losses[2:]]


@pytest.fixture(scope="module")
def launched(world, tmp_path_factory):
    """A launch on one process: its --save folder, output and report."""
    save = tmp_path_factory.mktemp("launch") / "save"
    status, output, report = _launch(world, save)
    assert status == 0, output[-4000:]
    return save, output, report


def test_an_experts_launch_trains_as_our_own_loop(world, launched, tmp_path):
    save, output, _ = launched
    assert main(runs.expert_options(world, tmp_path / "own_loop")) == 0
    expected = [row["loss"] for row in runs.metrics(tmp_path / "own_loop")]
    assert _losses(output) == pytest.approx(expected, rel=1e-6)
    ours, theirs = open_model(tmp_path / "own_loop"), open_model(save)
    assert theirs.card.training == ours.card.training == {"tokens": 768, "steps": 6, "lr": 5e-3, "seed": 1234}
    assert theirs.card.anchor_digest == ours.card.anchor_digest
    for (name, here), there in zip(tensors_of(ours).items(), tensors_of(theirs).values(), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6, msg=name)


def test_nothing_frozen_moves_or_has_a_gradient(launched):
    _, output, report = launched
    assert "frozen parameters unchanged, bit by bit; anchor digest" in output
    assert len(report["names"]) == 2 * 4
    assert all(TRAINED_BY_OWNER.search(name) for name in report["names"])
    # Two layers: three matrices of 48 x 32, a row and a bias.
    assert 2 * (3 * 48 * 32 + 32 + 1) <= report["numbers"] < 2 * (3 * 48 * 32 + 32 + 1) + 1000


def test_its_checkpoints_are_packed_verified_and_merged(world, launched, tmp_path):
    save, _, _ = launched
    assert main(["pack", str(save / "iter_0000003"), str(tmp_path / "earlier")]) == 0
    assert main(["pack", str(save), str(tmp_path / "package")]) == 0
    assert main(["verify", str(tmp_path / "package"), "--anchor", str(world / "anchor")]) == 0
    assert main(["merge", "--anchor", str(world / "anchor"), str(tmp_path / "package"), "--out",
                 str(tmp_path / "merged")]) == 0
    merged, trained = tensors_of(open_model(tmp_path / "merged")), tensors_of(open_model(save))
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    assert torch.equal(merged[name], trained[name])
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("earlier", "package")]
    assert [manifest["training"]["steps"] for manifest in manifests] == [3, 6]


@pytest.mark.parametrize("layout", [["--tensor-model-parallel-size", "2", "--sequence-parallel"],
                                    ["--pipeline-model-parallel-size", "2"]], ids=["tensor", "pipeline"])
def test_two_processes_train_the_same(world, launched, tmp_path, layout):
    status, output, _ = _launch(world, tmp_path / "save", *layout, processes=2)
    assert status == 0, output[-4000:]
    one = tensors_of(open_model(launched[0]))
    for name, tensor in tensors_of(open_model(tmp_path / "save")).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_patched_tree_resumes_exactly(world, tmp_path):
    """With Megatron-LM's distributed optimizer, torch's AdamW, and a learning rate of the router's own."""
    tree = tmp_path / "tree"
    shutil.copytree(TREE, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", "tests", "docs"))
    change(tree, apply=True)
    options = ["--use-distributed-optimizer", "--decoupled-lr", "5e-2", "--decoupled-min-lr", "0"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    status, output, _ = _launch(world, whole, *options, tree=tree)
    assert status == 0, output[-4000:]
    shutil.copytree(whole / "iter_0000003", resumed / "iter_0000003")
    (resumed / "latest_checkpointed_iteration.txt").write_text("3")
    status, output, _ = _launch(world, resumed, *options, tree=tree)
    assert status == 0, output[-4000:]
    assert len(re.findall("lm loss", output)) == 3
    ends = [tensors_of(open_model(path / "iter_0000006")) for path in (whole, resumed)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_new_anchor_is_opened_and_another_architecture_is_refused(world, tmp_path):
    sizes = ["--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4",
             "--num-query-groups", "2", "--max-position-embeddings", "32", "--tokenizer-type", "NullTokenizer",
             "--vocab-size", "263", "--make-vocab-size-divisible-by", "8", "--train-data-path", f"{world}/public"]
    status, output, _ = _launch(world, tmp_path / "save", *sizes, expert=False)
    assert status == 0, output[-4000:]
    trained = open_model(tmp_path / "save")
    assert (trained.card.kind, trained.card.model.vocab_size) == ("dense", 264)
    assert trained.card.training["steps"] == 6
    status, output, _ = _launch(world, tmp_path / "refused", "--num-layers", "3")
    assert status == 2
    assert "flexolmo: Megatron-LM's argument num_layers = 3: expected 2, as the anchor demands" in output
    status, output, _ = _launch(world, tmp_path / "save")
    assert status == 2
    assert f"{tmp_path}/save/iter_0000006 belongs to another run: its kind is dense, this run's is pair" in output


def test_the_example_is_a_launch(world, tmp_path):
    """expert.sh as it stands, with sizes that this machine can do in place of the paper's."""
    environment = {**os.environ, "MEGATRON_LM": str(TREE), "ANCHOR": f"{world}/anchor", "EXPERT": "own",
                   "VECTOR": f"{world}/own.npz", "DATA": f"{world}/own", "SAVE": f"{tmp_path}/save",
                   "LAUNCH": f"{sys.executable} {ROOT}/tests/integrations/cpu_launch.py",
                   "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
                   "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": ":".join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    smaller = [*EXISTING, "--tensor-model-parallel-size", "1", "--lr-warmup-iters", "2", "--train-iters", "3"]
    result = subprocess.run(["bash", ROOT / "examples" / "megatron_lm" / "expert.sh", *smaller], env=environment,
                            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "frozen parameters unchanged, bit by bit" in result.stdout
    assert main(["pack", str(tmp_path / "save"), str(tmp_path / "package")]) == 0
