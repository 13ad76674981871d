"""How work on many bytes reports its progress when only the worker knows how many there will be."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]
"""Called with the total number of bytes; gives a context whose value is called with the number of bytes just done."""


def no_progress(total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Show nothing."""
    return contextlib.nullcontext(lambda count: None)
