"""The one error type for users: bad input, described in a single sentence."""

import difflib
from collections.abc import Iterable


class FlexOlmoError(ValueError):
    """Something the user gave cannot be used.

    The message names the thing, its value and what was expected. The command line prints it without a
    traceback and exits with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``known`` to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
