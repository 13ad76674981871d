"""Progress of work on documents: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_INTERVAL = 30.0
"""Seconds between two lines in a log."""


class DocumentProgress:
    """Counts documents and their bytes, and shows both with their rates on standard error. A context manager."""

    def __init__(self, total: int | None = None) -> None:
        """Begin; ``total`` is the number of documents, if it is known, from which the time that is left follows."""
        self.documents = 0
        self.text_bytes = 0
        self._total = total
        self._start = self._shown = time.monotonic()
        self._bar = tqdm(total=total, unit=" documents", unit_scale=True, disable=None)

    def add(self, documents: int, text_bytes: int) -> None:
        """Count ``documents`` with together ``text_bytes`` bytes of text."""
        self.documents += documents
        self.text_bytes += text_bytes
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        megabytes = self.text_bytes / 1e6
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{megabytes:,.1f} MB, {megabytes / seconds:,.1f} MB/s", refresh=False)
            self._bar.update(documents)
        elif now - self._shown >= LOG_INTERVAL:
            self._shown = now
            rate, of, left = self.documents / seconds, "", ""
            if self._total is not None and self.documents:
                of = f" of {self._total:,}"
                left = f", {tqdm.format_interval((self._total - self.documents) / rate)} left"
            print(f"{self.documents:,}{of} documents, {megabytes:,.1f} MB, {rate:,.0f} documents/s, "
                  f"{megabytes / seconds:,.1f} MB/s{left}", file=sys.stderr, flush=True)

    def __enter__(self) -> "DocumentProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._bar.close()


def with_progress(documents: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
    """Yield documents and show how many there have been; ``size`` gives the bytes of one."""
    with DocumentProgress() as progress:
        for document in documents:
            yield document
            progress.add(1, size(document))
