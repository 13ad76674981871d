"""What rank 0 shows while a run goes on. Nothing here raises: a full disk under the job's log, or a closed pipe, must
not end one rank while the others wait for it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

import torch
from tqdm import tqdm


def say(text: str) -> None:
    """Print a line, on rank 0 alone."""
    if torch.distributed.get_rank() == 0:
        with _silenced_by_errors(sys.stdout):
            tqdm.write(text)
            sys.stdout.flush()


class Bar:
    """A progress bar over the steps of a run, on rank 0's terminal alone."""

    def __init__(self, total: int, done: int) -> None:
        hidden = None if torch.distributed.get_rank() == 0 else True
        self._bar = tqdm(total=total, disable=True)
        with _silenced_by_errors(sys.stderr):
            self._bar = tqdm(total=total, initial=done, unit="step", disable=hidden)

    def advance(self) -> None:
        with _silenced_by_errors(sys.stderr):
            self._bar.update(1)

    def close(self) -> None:
        with _silenced_by_errors(sys.stderr):
            self._bar.close()


@contextmanager
def _silenced_by_errors(stream: IO[str]) -> Iterator[None]:
    """Where the block cannot write to ``stream``, what is still written there goes nowhere; also what Python has
    buffered, which would make the exit status an error."""
    try:
        yield
    except OSError:
        with suppress(OSError):  # a stream without a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
