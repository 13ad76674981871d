"""The one error type for users: bad input, described in a single sentence."""

import difflib
from collections.abc import Iterable


class FlexOlmoError(ValueError):
    """Something the user gave cannot be used.

    The message names the thing, its value and what was expected. The command line prints it without a
    traceback and exits with status 2.
    """


class StopRequested(Exception):
    """A run was asked to stop by a signal, and has saved its state: the next start goes on with it.

    The command line prints the message and exits with ``REQUEUE_STATUS``.
    """


REQUEUE_STATUS = 75
"""Exit status of a run that was asked to stop: EX_TEMPFAIL of sysexits.h, try again later."""


def first_line(error: Exception) -> str:
    """First line of another library's message, or the type of the error where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``known`` to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
