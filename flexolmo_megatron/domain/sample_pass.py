"""One pass over a sample of documents, which goes on where it was stopped."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file
from flexolmo_megatron.training.progress import DocumentProgress

SAVE_INTERVAL = 60.0
"""Seconds between two writes of what a stopped run goes on from."""


class SamplePass:
    """Documents in batches, and the sums over them so far, which are in a file now and then.

    The file holds neither texts nor single embeddings, but no noise either: an owner's stays with the owner.
    """

    def __init__(self, texts: Sequence[str], batch_size: int, reader: tuple, path: Path | None) -> None:
        """Take the sums that ``path`` holds, unless they are over another sample or by another ``reader``.

        Args:
            texts: the sample.
            batch_size: read at once.
            reader: what the sums depend on besides, as values whose ``repr`` tells them apart.
            path: of the file, which the caller removes when all is done; None for a pass that starts anew.

        Raises:
            FlexOlmoError: the batch size is impossible, or the file cannot be read.
        """
        if batch_size < 1:
            raise FlexOlmoError(f"--batch-size {batch_size}: expected a number of at least 1")
        # Sorted by length, so that little of a batch is padding; longest first, so that a lack of memory shows at once.
        self._texts = sorted(texts, key=len, reverse=True)
        self.sums: dict[str, ArrayLike | torch.Tensor] = {}
        """What the caller adds up; arrays where they come from a file."""
        self._batch_size, self._path, self._saved, self._done = batch_size, path, time.monotonic(), 0
        if path is None:
            return
        self._fingerprint = self._fingerprint_of(reader)
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as kept:
                    if str(kept["fingerprint"]) == self._fingerprint:
                        self.sums = {name[4:]: kept[name] for name in kept if name.startswith("sum_")}
                        self._done = int(kept["done"])
            except Exception as error:  # numpy passes on whatever its readers raise
                raise FlexOlmoError(f"{path} is not what an earlier start has left ({error}): remove it") from error

    def __iter__(self) -> Iterator[list[str]]:
        """Yield the batches that are left; before the next one ``sums`` must hold the last."""
        with DocumentProgress(len(self._texts) - self._done) as progress:
            for start in range(self._done, len(self._texts), self._batch_size):
                batch = self._texts[start : start + self._batch_size]
                yield batch
                self._done += len(batch)
                progress.add(len(batch), sum(len(text.encode()) for text in batch))
                if self._path and time.monotonic() - self._saved >= SAVE_INTERVAL:
                    self._save(self._path)

    def _save(self, path: Path) -> None:
        sums = {f"sum_{name}": value.cpu().numpy() if isinstance(value, torch.Tensor) else value
                for name, value in self.sums.items()}
        with atomic_file(path) as file:
            np.savez(file, fingerprint=np.array(self._fingerprint), done=self._done, **sums)
        self._saved = time.monotonic()

    def _fingerprint_of(self, reader: tuple) -> str:
        digest = hashlib.blake2b(repr(reader).encode())
        for text in self._texts:
            digest.update(hashlib.blake2b(text.encode()).digest())
        return digest.hexdigest()
