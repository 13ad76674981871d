import json

import pytest
import torch
from safetensors.torch import load_file

from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.package import open_package, pack


def test_tensors_and_manifest(new_pair, digest, tmp_path):
    pair = new_pair(1, digest, bias=True)
    counts = []
    manifest = pack(pair, None, tmp_path / "p", name="math", owner="Ä\nB", progress=counts.append)
    tensors = load_file(tmp_path / "p" / "expert.safetensors")
    shapes = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12), "router": (8,), "bias": ()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp."
        assert torch.equal(tensors[f"layers.{layer}.router"], pair.tensors[prefix + "gate.weight"].read()[0])
        assert torch.equal(tensors[f"layers.{layer}.bias"], pair.tensors[prefix + "gate.bias"].read()[0])
        for kind in ("gate_proj", "up_proj", "down_proj"):
            trained = pair.tensors[f"{prefix}experts.1.{kind}.weight"].read()
            assert torch.equal(tensors[f"layers.{layer}.{kind}"], trained)
    assert sum(counts) == sum(tensor.nbytes for tensor in tensors.values())
    written = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert written == manifest.to_json()
    assert written["architecture"] == {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "dtype": "BF16",
                                       "num_attention_heads": pair.card.model.num_attention_heads,
                                       "num_query_groups": pair.card.model.num_query_groups,
                                       "rotary_base": 500_000.0, "layernorm_epsilon": 1e-6}
    assert (written["anchor_digest"], written["owner"]) == (digest, "Ä\nB")
    package = open_package(tmp_path / "p")
    assert package.manifest == manifest and package.has_bias
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["expert.safetensors", "manifest.json"]


def test_only_the_manifests_own_fields_leave_with_the_package(new_pair, digest, tmp_path):
    pair = new_pair(1, digest)
    pair.card.training.update(data="/secret/documents", dp={"epsilon": 1.0, "user": "x"}, seed=None)
    pair.card.experts[1].router["sample"] = "a document"
    manifest = pack(pair, None, tmp_path / "p", name="math")
    assert manifest.training == {"tokens": 4096, "steps": 8, "lr": 9e-4, "dp": {"epsilon": 1.0}}
    assert manifest.router == {"embedder": "anchor", "documents": 1000}


def with_tensor(pair, name, value):
    tensors = {**pair.tensors, name: LazyTensor(value.dtype, tuple(value.shape), value.clone)}
    return LazyModel(pair.card, tensors)


@pytest.mark.parametrize(("change", "options", "message"), [
    (lambda pair, anchor: anchor, {}, "a checkpoint of kind 'moe' cannot be packed: expected 'pair'"),
    (lambda pair, anchor: pair, {"anchor_digest": "0" * 64},
     "was trained against anchor [0-9a-f]{64}, not against 0000"),
    (lambda pair, anchor: pair, {"name": "public"}, "reserved"),
    (lambda pair, anchor: pair, {"name": "../x"}, "expected 1 to 64 of A-Z"),
    (lambda pair, anchor: pair, {"contact": "\x1b"}, "contact holds the control character"),
    (lambda pair, anchor: with_tensor(pair, "model.layers.1.mlp.gate.weight",
                                      torch.full((1, 8), float("nan"), dtype=torch.bfloat16)), {},
     "tensor layers.1.router holds NaN or infinity"),
    (lambda pair, anchor: with_tensor(pair, "model.layers.1.mlp.gate.weight", torch.ones(1, 8)), {},
     "tensor layers.1.router is F32: expected BF16"),
])
def test_refuses_and_writes_nothing(new_pair, anchor, digest, tmp_path, change, options, message):
    options = {"anchor_digest": None, "name": "math", **options}
    with pytest.raises(FlexOlmoError, match=message):
        pack(change(new_pair(1, digest), anchor), out=tmp_path / "new" / "p", **options)
    assert not (tmp_path / "new" / "p").exists()
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_needs_an_anchor(new_pair, digest, tmp_path):
    with pytest.raises(FlexOlmoError, match="does not record the anchor it was trained against"):
        pack(new_pair(1, None), None, tmp_path / "p", name="math")
    assert pack(new_pair(1, None), digest, tmp_path / "p", name="math").anchor_digest == digest


def test_never_overwrites(new_pair, digest, tmp_path):
    pack(new_pair(1, digest), None, tmp_path / "p", name="math")
    before = (tmp_path / "p" / "manifest.json").read_bytes()
    with pytest.raises(FlexOlmoError, match="p already exists; name a new directory or remove it first"):
        pack(new_pair(2, digest), None, tmp_path / "p", name="code")
    assert (tmp_path / "p" / "manifest.json").read_bytes() == before
