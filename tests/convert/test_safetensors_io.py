import json
import struct

import pytest
import safetensors.torch
import torch

from flexolmo_megatron.convert.lazy import LazyTensor
from flexolmo_megatron.convert.safetensors_io import (
    open_file,
    read_header,
    read_open_header,
    split_shards,
    write_shards,
    write_tensors,
)
from flexolmo_megatron.errors import FlexOlmoError


def lazy(tensor):
    return LazyTensor(tensor.dtype, tuple(tensor.shape), tensor.clone)


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TENSORS = {
    "half": torch.arange(3, dtype=torch.bfloat16), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4),
    "matrix": torch.randn(5, 7), "long": torch.tensor([1, -2**60]), "flag": torch.tensor([True, False]),
}


def test_files_of_the_reference_implementation_are_read(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    opened = open_file(tmp_path / "a.safetensors")
    assert opened.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert opened[name].dtype == tensor.dtype and opened[name].shape == tuple(tensor.shape)
        assert torch.equal(opened[name].read(), tensor)


def test_the_reference_implementation_reads_our_files(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as file:
        write_tensors(file, {name: lazy(tensor) for name, tensor in TENSORS.items()}, {"format": "pt"})
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for info in read_header(tmp_path / "a.safetensors").values():
        assert info.offset % info.dtype.itemsize == 0


def test_each_read_is_a_new_copy(tmp_path):
    write(tmp_path / "a", {"x": entry()}, bytes(8))
    tensor = open_file(tmp_path / "a")["x"]
    tensor.read().fill_(1)
    assert torch.equal(tensor.read(), torch.zeros(2))


BAD = {
    "dtype": ({"x": entry(dtype="F4")}, bytes(8), "tensor 'x': dtype 'F4': expected one of F64, F32"),
    "dtype number": ({"x": entry(dtype=3)}, bytes(8), "tensor 'x': dtype '3': expected one of F64"),
    "negative shape": ({"x": entry(shape=(-2,))}, bytes(8), r"tensor 'x': shape \[-2\]: expected at most 8 sizes"),
    "float shape": ({"x": entry(shape=(2.0,))}, bytes(8), r"tensor 'x': shape \[2.0\]: expected at most 8 sizes"),
    "bool shape": ({"x": entry(shape=(True,))}, bytes(8), r"tensor 'x': shape \[True\]: expected at most 8 sizes"),
    "deep shape": ({"x": entry(shape=(1,) * 9)}, bytes(8), "expected at most 8 sizes of 0 or more"),
    "size": ({"x": entry(shape=(3,))}, bytes(8), r"data_offsets span 8 bytes: expected 12 for shape \[3\] of F32"),
    "overflow": ({"x": entry(shape=(2**62, 2**62))}, bytes(8), "data_offsets span 8 bytes: expected 85070"),
    "reversed": ({"x": entry(offsets=(8, 0))}, bytes(8), r"data_offsets \[8, 0\]: expected \[first byte, past"),
    "negative offset": ({"x": entry(offsets=(-8, 0))}, bytes(8), r"data_offsets \[-8, 0\]: expected"),
    "float offset": ({"x": entry(offsets=(0, 8.0))}, bytes(8), r"data_offsets \[0, 8.0\]: expected"),
    "one offset": ({"x": entry(offsets=(8,))}, bytes(8), r"data_offsets \[8\]: expected"),
    "overlap": ({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12), "tensor 'y' overlaps the one before it"),
    "same place": ({"x": entry(), "y": entry()}, bytes(8), "tensor 'y' overlaps the one before it"),
    "gap": ({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20), "tensor 'y' leaves a gap before it"),
    "gap first": ({"x": entry(offsets=(4, 12))}, bytes(12), "tensor 'x' leaves a gap before it"),
    "truncated": ({"x": entry()}, bytes(7), r"is truncated: \d+ bytes, expected \d+"),
    "trailing": ({"x": entry()}, bytes(9), r"has trailing bytes: \d+ bytes, expected \d+"),
    "no entry": ({"x": 3}, bytes(8), "tensor 'x': expected exactly dtype, shape and data_offsets"),
    "extra field": ({"x": {**entry(), "code": "x"}}, bytes(8), "expected exactly dtype, shape and data_offsets"),
    "list": ([1], b"", "the safetensors header is a list: expected a JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ of the safetensors header: expected an object of str"),
    "not JSON": (b"{", b"", "the safetensors header is not valid JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"", "the safetensors header is not valid JSON"),
    "twice": (b'{"x":1,"x":2}', b"", "is not valid JSON .the key 'x' twice"),
    "field twice": (b'{"x":{"dtype":"F32","dtype":"F64"}}', b"", "is not valid JSON .the key 'dtype' twice"),
    "NaN": (b'{"x":NaN}', b"", "is not valid JSON .the number NaN"),
    "nested": (b"[" * 200_000, b"", "is not valid JSON .too deeply nested"),
    "huge number": (b'{"x":' + b"9" * 5000 + b"}", b"", "is not valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(tmp_path, name):
    header, data, message = BAD[name]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(FlexOlmoError, match=message) as error:
        read_header(path)
    assert "bad.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_an_open_file_is_read_whatever_its_path_leads_to_by_now(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    with open(path, "rb") as file:
        file.seek(3)
        path.unlink()
        write(path, b"nothing sound")
        header = read_open_header(file.fileno(), "its name")
        assert file.tell() == 3
        file.seek(0)
        data = file.read()
    assert header.entries.keys() == TENSORS.keys()
    assert data.startswith(header.raw) and len(header.raw) == min(info.offset for info in header.entries.values())
    with open(path, "rb") as file, pytest.raises(FlexOlmoError, match="^its name: the safetensors header is not valid"):
        read_open_header(file.fileno(), "its name")


def test_header_size_is_checked_before_it_is_read(tmp_path):
    path = write(tmp_path / "a", {}, length=2**60)
    with pytest.raises(FlexOlmoError, match=f"header of {2**60} bytes: expected at most 100000000"):
        read_header(path)
    with (open(write(tmp_path / "b", b" " * 50), "rb") as file,
          pytest.raises(FlexOlmoError, match="header of 50 bytes: expected at most 40")):
        read_open_header(file.fileno(), "b", max_header_bytes=40)
    with pytest.raises(FlexOlmoError, match="its header should have 1000 bytes, the whole file has 10"):
        read_header(write(tmp_path / "c", {}, length=1000))


def test_what_is_no_safetensors_file(tmp_path):
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(FlexOlmoError, match="has 4 bytes: expected a safetensors file, which has at least 8"):
        read_header(tmp_path / "short")
    with pytest.raises(FlexOlmoError, match="is a directory: expected a safetensors file"):
        read_header(tmp_path)
    with pytest.raises(FlexOlmoError, match="does not exist; expected a safetensors file"):
        read_header(tmp_path / "none")
    with pytest.raises(FlexOlmoError, match="/dev/zero is not a file: expected a safetensors file"):
        read_header("/dev/zero")
    torch.save({}, tmp_path / "pickle")
    with pytest.raises(FlexOlmoError, match="safetensors header of"):
        read_header(tmp_path / "pickle")


def test_a_file_that_shrinks_or_goes_after_it_was_opened(tmp_path):
    path = write(tmp_path / "a", {"x": entry()}, bytes(8))
    tensor = open_file(path)["x"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FlexOlmoError, match=r"is truncated: \d+ bytes, expected at least \d+"):
        tensor.read()
    path.unlink()
    with pytest.raises(FlexOlmoError, match="cannot be read: No such file"):
        tensor.read()


def test_shards_have_the_names_of_save_pretrained_and_the_index_finds_every_tensor(tmp_path):
    tensors = {f"t{number}": lazy(torch.full((10,), float(number))) for number in range(5)}
    assert list(split_shards(tensors, 1000)) == ["model.safetensors"]
    shards = split_shards(tensors, 90)
    assert {name: list(shard) for name, shard in shards.items()} == {
        "model-00001-of-00003.safetensors": ["t0", "t1"], "model-00002-of-00003.safetensors": ["t2", "t3"],
        "model-00003-of-00003.safetensors": ["t4"]}
    write_shards(tmp_path, tensors, 90)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    for name, file_name in index["weight_map"].items():
        assert torch.equal(open_file(tmp_path / file_name)[name].read(), tensors[name].read())


def test_a_tensor_above_the_limit_gets_a_file_of_its_own():
    tensors = {name: lazy(torch.zeros(size)) for name, size in (("a", 1), ("b", 100), ("c", 1))}
    assert [list(shard) for shard in split_shards(tensors, 50).values()] == [["a"], ["b"], ["c"]]
