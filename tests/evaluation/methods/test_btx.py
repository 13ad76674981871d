"""The mixture that BTX starts its training from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexolmo_megatron import load_model
from flexolmo_megatron.convert.initial import random_model as initial_model
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods import Models, build_methods
from flexolmo_megatron.evaluation.methods.btx import merge_btx, write_btx
from tests.random_models import SIZES, random_model, tensors_of


@pytest.mark.parametrize("published", [False, True])
def test_every_tensor(published: bool) -> None:
    public = random_model("moe", 1, 1, seed=9) if published else random_model("dense", seed=9)
    owners = {"math": random_model("dense", seed=1), "code": random_model("dense", seed=2)}
    merged = merge_btx(public, owners, top_k=2, seed=4)
    assert merged.card.expert_names == ["public", "math", "code"]
    assert (merged.card.kind, merged.card.model) == ("moe", replace(SIZES, num_experts=3, top_k=2))
    parts = [tensors_of(model) for model in (public, *owners.values())]
    router = initial_model(replace(merged.card, kind="router"), 4)
    seen = 0
    for name, value in tensors_of(merged).items():
        if ".mlp.gate." in name:
            expected = router.tensors[name].read()
        elif ".mlp." in name:
            number = int(name.split(".experts.")[1][0])
            own = name if published and number == 0 else name.replace(f".experts.{number}", "")
            expected = parts[number][own]
        else:
            expected = (torch.stack([part[name].double() for part in parts]).sum(dim=0) / 3).float()
        assert torch.equal(value, expected), name
        seen += 1
    assert seen == len(random_model("moe", 3, 2).tensors)
    assert len({merged.tensors[f"model.layers.{layer}.mlp.gate.weight"].read().sum().item() for layer in (0, 1)}) == 2


@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_written_and_loaded(tmp_path: Path, format: str) -> None:
    save_model(random_model("moe", 1, 1), tmp_path / "public", "megatron")
    save_model(random_model("dense", seed=1), tmp_path / "math", "hf")
    write_btx(tmp_path / "public", {"math": tmp_path / "math"}, tmp_path / "btx", top_k=1, seed=0, format=format)
    expected = merge_btx(open_model(tmp_path / "public"), {"math": open_model(tmp_path / "math")}, 1, 0)
    for name, value in tensors_of(open_model(tmp_path / "btx")).items():
        assert torch.equal(value, expected.tensors[name].read()), name
    model = load_model(tmp_path / "btx")
    assert model.expert_names == ["public", "math"]
    assert model.logits([[1, 2, 3]]).isfinite().all()


def test_refusals() -> None:
    public = random_model("dense")
    with pytest.raises(FlexOlmoError, match=r"model.top_k = 3: expected 1 to model.num_experts = 2"):
        merge_btx(public, {"math": public}, 3, 0)
    with pytest.raises(FlexOlmoError, match="model 2 and the first one differ in their sizes"):
        merge_btx(public, {"math": random_model("dense", sizes=replace(SIZES, ffn_hidden_size=16))}, 1, 0)


def test_the_method_is_the_trained_mixture(tmp_path: Path) -> None:
    assert build_methods(Models(tmp_path), families=["btx"]) == []
    method, = build_methods(Models(tmp_path, {"a": tmp_path, "b": tmp_path}, btx=tmp_path / "btx"), families=["btx"])
    assert [variant.path for variant in method.variants] == [tmp_path / "btx"]
    assert method.training == "public + 2 owner + btx"
    assert method.training_tokens({"public": 100, "owner": 10, "btx": 1}) == 121
