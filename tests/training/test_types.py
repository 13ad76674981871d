"""An owner's run in another type than the anchor's: the package has the anchor's, and merges."""

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.model import open_model
from tests.training.runs import SMALL


@pytest.fixture(scope="module")
def bf16_world(world, tmp_path_factory):
    """An anchor in bf16 and a vector made with it."""
    folder = tmp_path_factory.mktemp("bf16")
    train = ["train", "anchor", *SMALL, "bf16=true", f"out={folder}/run", f"data.train=[{world}/public]"]
    assert main(train) == 0
    embed = ["embed", "--anchor"]
    publish = ["--out", f"{folder}/public.npz", "--publish", f"{folder}/anchor"]
    assert main([*embed, f"{folder}/run", f"{world}/public.jsonl", *publish]) == 0
    assert main([*embed, f"{folder}/anchor", f"{world}/own.jsonl", "--out", f"{folder}/own.npz"]) == 0
    return folder


@pytest.mark.parametrize("computed", ["bf16=true", "bf16=false"])
def test_a_bf16_anchor(bf16_world, expert_options, tmp_path, computed):
    options = [f"anchor={bf16_world}/anchor", f"expert.domain_vector={bf16_world}/own.npz", computed]
    assert main(expert_options(tmp_path / "run", *options)) == 0
    assert main(["pack", f"{tmp_path}/run", f"{tmp_path}/package"]) == 0
    merge = ["merge", "--anchor", f"{bf16_world}/anchor", f"{tmp_path}/package", "--out", f"{tmp_path}/merged"]
    assert main(merge) == 0
    run, merged = open_model(tmp_path / "run"), open_model(tmp_path / "merged")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert merged.tensors[name].dtype == torch.bfloat16
    assert merged.tensors[name].read().equal(run.tensors[name].read().bfloat16())
    bias = merged.tensors["model.layers.0.mlp.gate.bias"]
    assert bias.dtype == torch.float32 and bias.read()[0] == 0
    assert main(["generate", f"{tmp_path}/merged", "--prompt", "def", "--max-new-tokens", "2"]) == 0
