"""A package's tensor file, read so that what is used is what was hashed.

The file's SHA-256 is computed in file order while tensors are read in whatever order the reader wants. The state of
the hash is kept at every tensor boundary: a tensor that is asked for early makes the ones before it be hashed first,
and one that is asked for again is hashed again from the state before it and must arrive at the state after it. So one
pass over a file costs one hash of it, and a file that changes between two reads is noticed whatever its timestamps say.
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from flexolmo_megatron.convert.lazy import LazyTensor
from flexolmo_megatron.convert.safetensors_io import as_bytes, read_exactly, read_open_header
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.hash_pool import HashPool
from flexolmo_megatron.exchange.safe_open import looks_pickled, read_start
from flexolmo_megatron.streaming import memory

MAX_HEADER_BYTES = 4 * 1024 * 1024
"""Enough for more than 5,000 layers."""


class TensorFile:
    """An open safetensors file whose header is sound; the contents are checked as they are read, see ``finish``."""

    def __init__(self, descriptor: int, where: str, pool: HashPool | None = None) -> None:
        """Take over ``descriptor``, of a regular file. Without a pool, a read returns after hashing.

        Raises:
            FlexOlmoError: not a safetensors file, or one whose header does not describe all of its bytes exactly.
        """
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.where = where
        self._pool = pool
        self._lock = threading.Lock()
        if looks_pickled(read_start(descriptor, 9, where)):
            raise FlexOlmoError(f"{where} is a pickle or torch archive, which is never opened; expected a safetensors "
                                "file")
        header = read_open_header(descriptor, where, MAX_HEADER_BYTES)
        self.entries = header.entries
        self._order = list(self.entries.values())
        self._index = {name: index for index, name in enumerate(self.entries)}
        self._states = [hashlib.sha256(header.raw)]
        self._submitted = 0
        """Tensors handed to the hash in file order so far; those whose state is known may be fewer."""
        self._last: Future | None = None
        self._non_finite: str | None = None

    def tensors(self) -> dict[str, LazyTensor]:
        """The tensors in file order; reading one raises FlexOlmoError if it is not what was hashed before."""
        return {name: LazyTensor(entry.dtype, entry.shape, lambda name=name: self.read(name))
                for name, entry in self.entries.items()}

    def read(self, name: str) -> torch.Tensor:
        index, entry = self._index[name], self.entries[name]
        with self._lock:
            while self._submitted < index:
                self._submit_next()
            if self._submitted == index:
                data = self._submit_next()
            else:
                data = self._read(entry.offset, entry.nbytes)
                self._run(self._compare, index, data)
        return data.view(entry.dtype).reshape(entry.shape)

    def sha256(self, progress: Callable[[int], object] | None = None) -> str:
        """Hash what was not read yet and return the SHA-256 of the whole file."""
        with self._lock:
            while self._submitted < len(self._order):
                count = self._submit_next().nbytes
                if progress is not None:
                    progress(count)
            if self._last is not None:
                self._last.result()
        return self._states[-1].hexdigest()

    def finish(self, sha256: str, progress: Callable[[int], object] | None = None) -> None:
        """Hash what was not read yet, and check the whole; ``progress`` gets the number of bytes after each tensor.

        Raises:
            FlexOlmoError: the file's SHA-256 is not ``sha256``, or a tensor holds NaN or infinity.
        """
        found = self.sha256(progress)
        if found != sha256:
            raise FlexOlmoError(f"{self.where} is damaged or was changed: its sha256 is {found}, the manifest says "
                                f"{sha256}")
        if self._non_finite is not None:
            raise FlexOlmoError(f"{self.where}: tensor {self._non_finite} holds NaN or infinity; expected finite "
                                "numbers only")

    def _changed(self) -> FlexOlmoError:
        return FlexOlmoError(f"{self.where} was changed while it was being used; nothing of it can be trusted")

    def _read(self, offset: int, length: int) -> torch.Tensor:
        try:
            data = memory(length)
        except (MemoryError, RuntimeError):  # torch raises the latter
            raise FlexOlmoError(f"{self.where}: a tensor of {length:,} bytes does not fit into memory") from None
        read_exactly(self._descriptor, offset, data, Path(self.where))
        return data

    def _submit_next(self) -> torch.Tensor:
        entry = self._order[self._submitted]
        data = self._read(entry.offset, entry.nbytes)
        self._run(self._hash_next, self._submitted, data)
        self._submitted += 1
        return data

    def _run(self, check: Callable[[int, torch.Tensor], None], index: int, data: torch.Tensor) -> None:
        if self._pool is None:
            check(index, data)
        else:
            # The pool starts jobs in the order of submission, so waiting inside one for an earlier one cannot deadlock.
            self._last = self._pool.submit(data.nbytes, self._after, self._last, check, index, data)

    @staticmethod
    def _after(previous: Future | None, check: Callable[[int, torch.Tensor], None], index: int,
               data: torch.Tensor) -> None:
        if previous is not None:
            previous.result()
        check(index, data)

    def _hash_next(self, index: int, data: torch.Tensor) -> None:
        self._states.append(self._advanced(index, data))
        entry = self._order[index]
        if data.numel() and self._non_finite is None:
            # NaN spreads to both, and this is one pass without a temporary: isfinite().all() is 50 times slower
            smallest, largest = torch.aminmax(data.view(entry.dtype))
            if not (torch.isfinite(smallest) and torch.isfinite(largest)):
                self._non_finite = list(self.entries)[index]

    def _compare(self, index: int, data: torch.Tensor) -> None:
        if self._advanced(index, data).digest() != self._states[index + 1].digest():
            raise self._changed()

    def _advanced(self, index: int, data: torch.Tensor) -> Any:
        state = self._states[index].copy()
        state.update(as_bytes(data))
        return state
