"""Hashing beside reading: threads, and memory that is used again.

The readers of a merge's packages share one pool.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

MAX_WAITING_BYTES = 256 * 1024 * 1024
"""Of tensors that were read but not yet hashed: enough for hashing to go on while the disk is waited for."""
_RECYCLED_FROM = 1024 * 1024
"""Smallest tensor, in bytes, whose memory is worth keeping."""


class HashPool:
    """Threads that hash tensors while their reader goes on (hashlib releases the GIL).

    One pool serves all files of a merge, and what waits in it is bounded: memory does not grow with the number of
    packages.
    """

    def __init__(self) -> None:
        self._free: deque[bytearray] = deque()
        self._free_size = 0
        self._executor = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="sha256")
        self._waiting: deque[tuple[Future, int]] = deque()
        self._waiting_bytes = 0

    def submit(self, num_bytes: int, function: Callable[..., None], *args: Any) -> Future:
        """Run ``function`` in a thread, after waiting until what others hold and ``num_bytes`` are within the limit."""
        while self._waiting and (self._waiting[0][0].done() or self._waiting_bytes + num_bytes > MAX_WAITING_BYTES):
            future, held = self._waiting.popleft()
            future.result()
            self._waiting_bytes -= held
        future = self._executor.submit(function, *args)
        self._waiting.append((future, num_bytes))
        self._waiting_bytes += num_bytes
        return future

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Return ``num_bytes`` of memory, preferably that of a tensor of the same size that is no longer used.

        New large blocks are mapped page by page, which takes several times as long as filling them from the page cache.
        """
        if num_bytes < _RECYCLED_FROM:
            return torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes != self._free_size:  # an expert's large tensors are all of one size
            self._free, self._free_size = deque(maxlen=max(1, MAX_WAITING_BYTES // num_bytes)), num_bytes
        try:
            block = self._free.pop()
        except IndexError:
            block = bytearray(num_bytes)
        view = memoryview(block)  # lives as long as the tensor's storage, views of the tensor included
        weakref.finalize(view, self._free.append, block).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def __enter__(self) -> "HashPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)
