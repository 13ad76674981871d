import os

import pytest
import torch

from flexolmo_megatron import streaming
from flexolmo_megatron.streaming import memory, recycling, streaming_file

SIZE = 2**20


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    with recycling():
        first = memory(SIZE)
        view, address = first.view(torch.bfloat16).reshape(2, -1), first.data_ptr()
        view.fill_(1)
        del first
        second = memory(SIZE)
        assert second.data_ptr() != address
        second.zero_()
        assert (view == 1).all()
        del view
        assert memory(SIZE).data_ptr() == address
    assert not streaming._recycler._kept


def test_nothing_is_kept_outside_or_beyond_the_limit(monkeypatch):
    tensor = memory(SIZE)
    del tensor
    assert not streaming._recycler._kept
    monkeypatch.setattr(streaming, "MAX_KEPT_BYTES", 2 * SIZE)
    with recycling():
        tensors = [memory(SIZE) for _ in range(5)]
        del tensors
        assert streaming._recycler._kept_bytes == 2 * SIZE
        kept = memory(SIZE)
    kept.zero_()
    del kept
    assert streaming._recycler._kept_bytes == 0


@pytest.mark.parametrize("length", [0, 1, 256 * 1024, 33 * 2**20 + 5])
def test_streaming_file_writes_what_it_is_given(tmp_path, length):
    data = os.urandom(length)
    with streaming_file(tmp_path / "x") as file:
        assert file.write(data) == length
        assert file.tell() == length
        file.write(torch.arange(3).numpy())
    assert (tmp_path / "x").read_bytes() == data + torch.arange(3).numpy().tobytes()
