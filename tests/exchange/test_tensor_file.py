import hashlib
import itertools
import os

import pytest
import torch

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange import tensor_file
from flexolmo_megatron.exchange.hash_pool import HashPool
from flexolmo_megatron.exchange.tensor_file import TensorFile

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def path(tmp_path):
    from safetensors.torch import save_file
    tensors = {name: torch.full((1000,), float(number)) for number, name in enumerate(NAMES)}
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def open_file(path, pool=None) -> TensorFile:
    return TensorFile(os.open(path, os.O_RDONLY), str(path), pool)


@pytest.mark.parametrize("pooled", [False, True])
def test_any_order_of_reads_gives_the_tensors_and_the_files_sha256(path, pooled):
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    with HashPool() as pool:
        for order in [*itertools.permutations(NAMES), [], ["c"], ["d", "a", "a", "d", "b"]]:
            file = open_file(path, pool if pooled else None)
            for name in order:
                assert torch.equal(file.read(name), torch.full((1000,), float(NAMES.index(name))))
            file.finish(expected)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("first", ["a", "d"])
def test_a_second_read_must_give_the_bytes_of_the_first(path, pooled, first):
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    with HashPool() as pool:
        file = open_file(path, pool if pooled else None)
        file.read(first)
        with open(path, "r+b") as other:
            other.seek(file.entries["a"].offset)
            other.write(b"\1")
        with pytest.raises(FlexOlmoError, match="was changed while it was being used; nothing of it can be trusted"):
            file.read("a")
            file.finish(expected)


def test_a_tensor_larger_than_memory(path, monkeypatch):
    def memory(num_bytes):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(tensor_file, "memory", memory)
    with pytest.raises(FlexOlmoError, match="x.safetensors: a tensor of 4,000 bytes does not fit into memory"):
        open_file(path).sha256()


def test_the_open_file_counts_and_not_its_path(path):
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    descriptor = os.open(path, os.O_RDONLY)
    path.unlink()
    path.write_bytes(b"something else")
    file = TensorFile(descriptor, str(path))
    assert torch.equal(file.read("b"), torch.ones(1000))
    file.finish(expected)


def test_descriptor_is_closed_with_the_file(path):
    file = open_file(path)
    descriptor = file._descriptor
    tensors = file.tensors()
    del file
    assert tensors["a"].read().shape == (1000,)
    tensors.clear()
    with pytest.raises(OSError):
        os.fstat(descriptor)
