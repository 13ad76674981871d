"""Small models in memory, a package of one, and packages taken apart to be changed."""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, ModelCard
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.names import expected_tensors
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.exchange.package import pack

SIZES = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, num_query_groups=1,
                    vocab_size=17, max_position_embeddings=32)


def build(card: ModelCard, seed: int, dtype: torch.dtype = torch.bfloat16) -> LazyModel:
    """A model of random numbers; a bias is fp32 and not positive."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(card.model, card.kind).items():
        value = torch.randn(shape, generator=generator)
        value = -value.abs() if name.endswith("gate.bias") else value.to(dtype)
        tensors[name] = LazyTensor(value.dtype, shape, value.clone)
    return LazyModel(card, tensors)


def build_anchor(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> LazyModel:
    return build(ModelCard("moe", replace(SIZES, num_experts=1, top_k=1), [ExpertRecord(PUBLIC)]), seed, dtype)


def build_pair(seed: int, digest: str | None, *, ffn: int = SIZES.ffn_hidden_size, bias: bool = False,
               window: int = 1, dtype: torch.dtype = torch.bfloat16) -> LazyModel:
    model = replace(SIZES, num_experts=2, top_k=2, ffn_hidden_size=ffn, router_bias=bias, router_window=window)
    experts = [ExpertRecord(PUBLIC), ExpertRecord("mine", router={"embedder": "anchor", "documents": 1000})]
    training = {"tokens": 4096, "steps": 8, "lr": 9e-4, "seed": 1}
    return build(ModelCard("pair", model, experts, anchor_digest=digest, training=training), seed, dtype)


class RawPackage:
    """A package taken apart into plain values; ``write`` keeps the manifest's sha256 consistent unless told not to."""

    def __init__(self, path: Path) -> None:
        self.manifest = json.loads((path / "manifest.json").read_text())
        data = (path / "expert.safetensors").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        self.header = json.loads(data[8:8 + length])
        self.data = bytearray(data[8 + length:])

    def tensor_file(self) -> bytes:
        header = json.dumps(self.header).encode()
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header + self.data

    def write(self, path: Path, *, tensor_file: bytes | None = None, manifest: bytes | None = None,
              seal: bool = True) -> Path:
        tensor_file = self.tensor_file() if tensor_file is None else tensor_file
        if seal:
            self.manifest["sha256"] = hashlib.sha256(tensor_file).hexdigest()
        path.mkdir()
        (path / "expert.safetensors").write_bytes(tensor_file)
        if manifest is None:
            manifest = json.dumps(self.manifest, indent=2).encode()
        (path / "manifest.json").write_bytes(manifest)
        return path

    def manifest_text(self, tensor_file: bytes | None = None) -> str:
        """The manifest as text, sealed for ``tensor_file``, to be edited as text."""
        self.manifest["sha256"] = hashlib.sha256(self.tensor_file() if tensor_file is None else tensor_file).hexdigest()
        return json.dumps(self.manifest, indent=2)


@pytest.fixture(scope="session")
def new_anchor() -> Callable[..., LazyModel]:
    return build_anchor


@pytest.fixture(scope="session")
def new_pair() -> Callable[..., LazyModel]:
    return build_pair


@pytest.fixture(scope="session")
def raw_package() -> type[RawPackage]:
    return RawPackage


@pytest.fixture(scope="session")
def anchor() -> LazyModel:
    return build_anchor()


@pytest.fixture(scope="session")
def digest(anchor) -> str:
    return model_digest(anchor)


@pytest.fixture
def make_package(tmp_path, digest):
    """Pack a pair of random numbers and return its directory: ``make_package(name, seed=..., ffn=..., bias=...)``."""

    def make(name: str, seed: int = 1, **options):
        out = tmp_path / f"package_{name}"
        pack(build_pair(seed, digest, **options), None, out, name=name, owner="An owner", licence="CC-BY-4.0",
             contact="a@b.c")
        return out

    return make
