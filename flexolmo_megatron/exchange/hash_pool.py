"""Hashing beside reading."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MAX_WAITING_BYTES = 256 * 1024 * 1024
"""Of tensors that were read but not yet hashed: enough for hashing to go on while the disk is waited for."""


class HashPool:
    """Threads that hash tensors while their reader goes on (hashlib releases the GIL).

    One pool serves all files of a merge, and what waits in it is bounded: memory does not grow with the number of
    packages.
    """

    def __init__(self) -> None:
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

    def __enter__(self) -> "HashPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)
