"""Every reason to refuse a package, and its sentence. ``test_fuzz.py`` has the same in bulk."""

import json
import os
import pickle
import struct
from dataclasses import replace

import pytest
import torch

from flexolmo_megatron.convert.model import select_experts
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.merge import merge
from flexolmo_megatron.exchange.verify import AnchorReference, VerifiedPackage, anchor_of, verify

GATE = "layers.0.gate_proj"


@pytest.fixture
def raw(make_package, raw_package):
    return raw_package(make_package("math"))


@pytest.fixture
def refused(anchor, digest, tmp_path):
    """Check that the package at ``path`` is refused with one sentence that holds ``message``."""
    reference = AnchorReference.of(anchor, digest)

    def check(path, message, anchor=reference):
        with pytest.raises(FlexOlmoError, match=message) as caught:
            verify(path, anchor)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600

    return check


def test_accepts_a_package(make_package, anchor, digest):
    package = make_package("math")
    counts = []
    verified = verify(package, anchor, counts.append)
    assert isinstance(verified, VerifiedPackage)
    assert verified.manifest.name == "math" and verified.manifest.anchor_digest == digest
    assert verified.manifest.training == {"tokens": 4096, "steps": 8, "lr": 9e-4, "seed": 1}
    assert verified.manifest.router == {"embedder": "anchor", "documents": 1000}
    assert sum(counts) == verified.num_bytes == 2 * (2 * (3 * 8 * 12 + 8))
    assert not verified.has_bias and verified.positive_bias_layers() == []


def test_accepts_a_merged_model_in_place_of_the_anchor(make_package, anchor):
    merged = merge(anchor, [verify(make_package("math", bias=True), anchor)])
    assert verify(make_package("code", seed=2), merged).manifest.name == "code"


def test_accepts_and_reports_a_positive_bias(make_package, raw_package, anchor, tmp_path):
    raw = raw_package(make_package("math", bias=True))
    start, end = raw.header["layers.1.bias"]["data_offsets"]
    raw.data[start:end] = struct.pack("<f", 0.5)
    verified = verify(raw.write(tmp_path / "p"), anchor)
    assert verified.has_bias and verified.positive_bias_layers() == [1]


def test_accepts_a_smaller_ffn(make_package, anchor):
    assert verify(make_package("math", ffn=8), anchor).manifest.architecture.ffn_hidden_size == 8


def test_wrong_anchor(make_package, refused, new_anchor, anchor):
    other = new_anchor(seed=5)
    refused(make_package("math"), "was trained against anchor [0-9a-f]{64}, but this anchor is [0-9a-f]{64}$", other)


@pytest.mark.parametrize("kind", ["dense", "renamed"])
def test_no_anchor(make_package, anchor, refused, kind, new_pair):
    model = new_pair(1, None)
    what = "kind 'pair'"
    if kind == "renamed":
        model = select_experts(anchor, [])
        model.card.experts[0] = type(model.card.experts[0])("other")
        what = "experts other"
    refused(make_package("math"), f"a model of {what} is no anchor: expected a published one", model)


@pytest.mark.parametrize(("options", "message"), [
    ({"ffn": 13}, "architecture.ffn_hidden_size = 13: expected at most the anchor's 12"),
    ({"dtype": torch.float32}, "architecture.dtype = F32: the anchor has BF16"),
    ({"dtype": torch.float16}, "architecture.dtype = F16: the anchor has BF16"),
])
def test_does_not_fit_the_anchor(make_package, refused, options, message):
    refused(make_package("math", **options), message)


@pytest.mark.parametrize(("field", "value"), [("num_attention_heads", 4), ("num_query_groups", 2),
                                              ("rotary_base", 10_000.0), ("layernorm_epsilon", 1e-5)])
def test_the_same_tensors_that_compute_something_else_are_another_anchor(make_package, anchor, refused, field, value):
    package = make_package("math")
    expected = getattr(anchor.card.model, field)
    assert value != expected
    other = replace(anchor, card=replace(anchor.card, model=replace(anchor.card.model, **{field: value})))
    refused(package, rf"architecture\.{field} = {expected}: the anchor has {value}", other)
    manifest = json.loads((package / "manifest.json").read_text())
    del manifest["architecture"][field]
    (package / "manifest.json").write_text(json.dumps(manifest))
    verify(package, other)  # one that does not say what it was trained with


@pytest.mark.parametrize(("field", "value", "message"), [
    ("num_layers", 1, "unexpected tensor 'layers.1"),
    ("num_layers", 3, r"tensor layers.2.gate_proj is missing: expected BF16 \[12, 8\]"),
    ("num_layers", 2**31, "tensor layers.2.gate_proj is missing"),
    ("hidden_size", 9, r"tensor layers.0.gate_proj has shape \[12, 8\]: expected \[12, 9\]"),
    ("ffn_hidden_size", 11, r"has shape \[12, 8\]: expected \[11, 8\], from the manifest's architecture"),
    ("dtype", "F16", "tensor layers.0.gate_proj is BF16: expected F16, from the manifest's architecture"),
])
def test_architecture_does_not_match_the_tensors(raw, refused, tmp_path, field, value, message):
    raw.manifest["architecture"][field] = value
    refused(raw.write(tmp_path / "p"), message)


def test_wrong_shape(raw, refused, tmp_path):
    raw.header[GATE]["shape"] = [8, 12]
    refused(raw.write(tmp_path / "p"), r"tensor layers.0.gate_proj has shape \[8, 12\]: expected \[12, 8\]")


def test_wrong_dtype(raw, refused, tmp_path):
    raw.header[GATE]["dtype"] = "F16"
    refused(raw.write(tmp_path / "p"), "tensor layers.0.gate_proj is F16: expected BF16")


def drop(raw, name):
    start, end = raw.header.pop(name)["data_offsets"]
    del raw.data[start:end]
    for entry in raw.header.values():
        entry["data_offsets"] = [at - (end - start) * (at >= end) for at in entry["data_offsets"]]


def test_missing_tensor(raw, refused, tmp_path):
    drop(raw, "layers.1.router")
    refused(raw.write(tmp_path / "p"), r"tensor layers.1.router is missing: expected BF16 \[8\]")


def test_bias_in_some_layers_only(make_package, raw_package, refused, tmp_path):
    raw = raw_package(make_package("math", bias=True))
    drop(raw, "layers.1.bias")
    refused(raw.write(tmp_path / "p"), r"tensor layers.1.bias is missing: expected F32 \[\]")


@pytest.mark.parametrize("name", ["extra", "layers.2.router", "layers.00.router", "model.layers.0.mlp.gate.weight"])
def test_extra_tensor(raw, refused, tmp_path, name):
    raw.header[name] = {"dtype": "BF16", "shape": [1], "data_offsets": [len(raw.data), len(raw.data) + 2]}
    raw.data += b"\0\0"
    refused(raw.write(tmp_path / "p"), f"unexpected tensor '{name}': an expert has none of that name")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "layers.0.gate_proj\x00", "layers.0/gate_proj",
                                  "..\\x", "layers.0.gate_proj\x1b[2J", "\ud800", "x" * 100_000])
def test_path_tricks_in_tensor_names(raw, refused, tmp_path, name):
    raw.header = {name if key == GATE else key: value for key, value in raw.header.items()}
    refused(raw.write(tmp_path / "p"), "tensor layers.0.gate_proj is missing")
    raw.header[GATE] = {"dtype": "BF16", "shape": [1], "data_offsets": [len(raw.data), len(raw.data) + 2]}
    raw.header[name], raw.header[GATE] = raw.header[GATE], raw.header[name]
    raw.data += b"\0\0"
    refused(raw.write(tmp_path / "q"), "unexpected tensor '")


@pytest.mark.parametrize("name", ["../x", "a/b", "public"])
def test_path_tricks_in_the_expert_name(raw, refused, tmp_path, name):
    raw.manifest["name"] = name
    refused(raw.write(tmp_path / "p"), "manifest.json: expert name ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["layers.1.down_proj", "layers.0.router", "layers.0.bias"])
def test_not_finite(make_package, raw_package, refused, tmp_path, value, tensor):
    raw = raw_package(make_package("math", bias=True))
    start = raw.header[tensor]["data_offsets"][0]
    number = struct.pack("<f", value)
    raw.data[start:start + (4 if tensor.endswith("bias") else 2)] = number if tensor.endswith("bias") else number[2:]
    refused(raw.write(tmp_path / "p"), f"tensor {tensor} holds NaN or infinity; expected finite numbers only")


def test_bit_flip(raw, refused, tmp_path):
    changed = bytearray(raw.tensor_file())
    changed[-1] ^= 1
    raw.manifest_text()
    path = raw.write(tmp_path / "p", tensor_file=changed, seal=False)
    refused(path, "safetensors is damaged or was changed: its sha256 is [0-9a-f]{64}, the manifest says [0-9a-f]{64}$")


def test_bit_flip_that_makes_a_nan_is_called_damage(raw, refused, tmp_path):
    changed = bytearray(raw.tensor_file())
    changed[-2:] = b"\xc0\x7f"
    raw.manifest_text()
    refused(raw.write(tmp_path / "p", tensor_file=changed, seal=False), "is damaged or was changed")


@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize(("change", "message"), [
    (lambda data: data[:-1], "expert.safetensors is truncated: "),
    (lambda data: data[:100], "truncated or no safetensors file"),
    (lambda data: data[:5], "has 5 bytes: expected a safetensors file"),
    (lambda data: b"", "has 0 bytes: expected a safetensors file"),
    (lambda data: data + b"\0", "has trailing bytes"),
    (lambda data: struct.pack("<Q", 2**63) + data[8:], "header of 9223372036854775808 bytes: expected at most 4194304"),
    (lambda data: struct.pack("<Q", 2**64 - 1) + data[8:], "header of 18446744073709551615 bytes"),
    (lambda data: struct.pack("<Q", 2**22) + data[8:], "truncated or no safetensors file"),
    (lambda data: struct.pack("<Q", 100_000) + b"[" * 100_000, "header is not valid JSON .too deeply nested"),
    (lambda data: struct.pack("<Q", 2) + b"[]", "header is a list"),
    (lambda data: struct.pack("<Q", 2) + b"{}", "tensor layers.0.gate_proj is missing"),
])
def test_broken_tensor_file(raw, refused, tmp_path, change, message, seal):
    refused(raw.write(tmp_path / "p", tensor_file=change(raw.tensor_file()), seal=seal), message)


def test_duplicate_tensor_names(raw, refused, tmp_path):
    header = json.dumps(raw.header)[:-1] + f', "{GATE}": {json.dumps(raw.header[GATE])}}}'
    file = struct.pack("<Q", len(header)) + header.encode() + raw.data
    refused(raw.write(tmp_path / "p", tensor_file=file), f"the key '{GATE}' twice")


def test_overlapping_tensors(raw, refused, tmp_path):
    raw.header["layers.0.up_proj"]["data_offsets"] = raw.header[GATE]["data_offsets"]
    refused(raw.write(tmp_path / "p"), "overlaps the one before it")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_format_version(raw, refused, tmp_path, version):
    raw.manifest["format_version"] = version
    refused(raw.write(tmp_path / "p"), "format_version = .*: this program reads version 1")


def test_oversized_manifest(raw, refused, tmp_path):
    refused(raw.write(tmp_path / "p", manifest=raw.manifest_text().encode() + b" " * 70_000), "larger than 65536 bytes")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(raw, anchor, tmp_path):
    """1152 bytes, in eight of them: 80 04 00 …, the first two bytes of pickle protocol 4."""
    path = raw.write(tmp_path / "p")
    data = (path / "expert.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length < 1152
    padded = (1152).to_bytes(8, "little") + data[8 : 8 + length] + b" " * (1152 - length) + data[8 + length :]
    assert padded[:2] == pickle.dumps(None, protocol=4)[:2]
    verify(raw.write(tmp_path / "q", tensor_file=padded), anchor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
def test_pickle_in_place_of_the_tensor_file(raw, refused, tmp_path, protocol):
    marker = tmp_path / "was unpickled"
    if protocol == "zip":
        torch.save({"a": torch.ones(2)}, tmp_path / "x")
        data = (tmp_path / "x").read_bytes()
    else:
        data = pickle.dumps(Bomb(marker), protocol=protocol)
    refused(raw.write(tmp_path / "p", tensor_file=data), "is a pickle or torch archive, which is never opened")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["weights.pt", "model.PKL", "a.bin", ".metadata.pickle"])
def test_pickled_file_beside(make_package, refused, name):
    package = make_package("math")
    (package / name).write_bytes(b"")
    refused(package, f"holds '{name}', which may be pickled and is refused")


@pytest.mark.parametrize("name", ["README", ".hidden", "manifest.json.bak", "x\n\x1b"])
def test_anything_else_beside(make_package, refused, name):
    package = make_package("math")
    (package / name).write_bytes(b"")
    refused(package, "holds the unexpected entry '")


@pytest.mark.parametrize("name", ["manifest.json", "expert.safetensors"])
def test_only_regular_files(make_package, refused, name, tmp_path):
    package = make_package("math")
    os.rename(package / name, tmp_path / name)
    refused(package, f"holds no {name}; expected an expert package")
    (package / name).symlink_to(tmp_path / name)
    refused(package, f"{name} is a symbolic link; expected a regular file")
    (package / name).unlink()
    (package / name).symlink_to("/dev/zero")
    refused(package, f"{name} is a symbolic link; expected a regular file")
    (package / name).unlink()
    os.mkfifo(package / name)
    refused(package, f"{name} is a FIFO; expected a regular file")  # and does not wait for a writer
    (package / name).unlink()
    (package / name).mkdir()
    refused(package, f"{name} is a directory; expected a regular file")


def test_not_a_package_at_all(refused, tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist; expected an expert package, which holds manifest.json and")
    (tmp_path / "file.pt").write_bytes(b"")
    refused(tmp_path / "file.pt", "cannot be opened as a directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no manifest.json")


def test_a_change_after_verification_is_noticed(make_package, anchor):
    path = make_package("math")
    package = verify(path, anchor)
    before = package.tensors["layers.1.down_proj"].read()
    status = os.stat(path / "expert.safetensors")
    with open(path / "expert.safetensors", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x11\x22")
    os.utime(path / "expert.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert before is not None
    with pytest.raises(FlexOlmoError, match="expert.safetensors was changed while it was being used"):
        package.tensors["layers.1.down_proj"].read()


def test_a_replaced_package_is_not_used(make_package, anchor):
    path = make_package("math")
    package = verify(path, anchor)
    before = package.tensors["layers.0.up_proj"].read()
    os.rename(path, path.with_name("old"))
    make_package("math", seed=9)
    assert torch.equal(package.tensors["layers.0.up_proj"].read(), before)


def test_anchor_of_leaves_only_the_anchor(anchor, digest, make_package):
    merged = merge(anchor, [verify(make_package("math", bias=True), anchor)])
    assert AnchorReference.of(merged).digest == digest
    assert anchor_of(merged).tensors.keys() == anchor.tensors.keys()
