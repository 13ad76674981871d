"""Progress of reading and writing, by bytes: a bar on a terminal, a line now and then in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

LOG_INTERVAL = 30.0
"""Seconds between two lines in a log."""


@contextlib.contextmanager
def byte_progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts bytes towards ``total`` and shows them on standard error.

    Args:
        total: bytes.
        what: what is happening, in front of the numbers.
    """
    start = shown = time.monotonic()
    done = 0
    bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None)

    def add(count: int) -> None:
        nonlocal done, shown
        done += count
        bar.update(count)
        now = time.monotonic()
        if bar.disable and now - shown >= LOG_INTERVAL:
            shown = now
            print(f"{what}: {done / 1e9:,.1f} of {total / 1e9:,.1f} GB, {done / 1e6 / (now - start):,.0f} MB/s",
                  file=sys.stderr, flush=True)

    with bar:
        yield add
