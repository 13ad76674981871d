"""Moving many gigabytes through memory and to disk at the disk's speed.

``memory`` and ``recycling``: large blocks of new memory are mapped page by page, which takes several times as long as
filling them from the page cache; while models are streamed, the memory of tensors that are gone is used again.

``streaming_file``: a file that is written in pieces of moderate size, and flushed to disk meanwhile. Pieces as large
as a tensor make the kernel look for large blocks of memory for its page cache, which at times is ten times slower; and
an fsync at the end of a large file that was not flushed before waits for all of it.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import IO, Any

import torch

MAX_KEPT_BYTES = 256 * 1024 * 1024
"""Of memory that waits to be used again."""
_RECYCLED_FROM = 1024 * 1024
"""Smallest block, in bytes, that is worth keeping."""
_PIECE = 256 * 1024
"""Bytes written by one call."""
_FLUSH_INTERVAL = 32 * 1024 * 1024
"""Bytes written between two starts of flushing."""


class _Recycler:
    def __init__(self) -> None:
        # Reentrant, because a block can be given back by the garbage collector at any time.
        self._lock = threading.RLock()
        self._users = 0
        self._kept: dict[int, list[bytearray]] = {}
        self._kept_bytes = 0

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._kept, self._kept_bytes = {}, 0

    def take(self, num_bytes: int) -> torch.Tensor:
        with self._lock:
            if not self._users or num_bytes < _RECYCLED_FROM:
                return torch.empty(num_bytes, dtype=torch.uint8)
            blocks = self._kept.get(num_bytes)
            if blocks:
                block = blocks.pop()
                self._kept_bytes -= num_bytes
            else:
                block = bytearray(num_bytes)
        view = memoryview(block)  # lives as long as the tensor's storage, views of the tensor included
        weakref.finalize(view, self._give, block).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def _give(self, block: bytearray) -> None:
        with self._lock:
            if self._users and self._kept_bytes + len(block) <= MAX_KEPT_BYTES:
                self._kept.setdefault(len(block), []).append(block)
                self._kept_bytes += len(block)


_recycler = _Recycler()


def memory(num_bytes: int) -> torch.Tensor:
    """Return ``num_bytes`` of uninitialised memory, uint8; within ``recycling`` preferably memory used before."""
    return _recycler.take(num_bytes)


@contextlib.contextmanager
def recycling() -> Iterator[None]:
    """Keep the memory of tensors from ``memory`` for the next ones, until the block ends."""
    _recycler.enter()
    try:
        yield
    finally:
        _recycler.leave()


class _StreamingFile:
    """A binary file to write to; everything but ``write`` is the underlying file's."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._written = self._flushed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            self._file.write(view[start:start + _PIECE])
        self._written += len(view)
        if self._written - self._flushed >= _FLUSH_INTERVAL and hasattr(os, "posix_fadvise"):
            # For written pages this advice starts writing them to disk, and does not wait for it.
            os.posix_fadvise(self._file.fileno(), self._flushed, self._written - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self._written
        return len(view)


@contextlib.contextmanager
def streaming_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a new file to write large tensors to, from its start to its end."""
    with open(path, "wb") as file:
        yield _StreamingFile(file)
