"""Options of a verb that stand in a YAML file: as words of its command line, and checked as the verb itself would."""

import argparse
import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Return options of a command as words of its command line: {max_tokens: 5} becomes --max-tokens 5."""
    words: list[str] = []
    for key, value in options.items():
        if value is not False and value is not None:
            words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def parse_words(words: Sequence[str], where: str) -> argparse.Namespace:
    """Parse ``flexolmo WORDS ...`` without running it.

    Args:
        words: the verb, what it needs, and the options.
        where: what an error is about, such as the name of a YAML key.

    Raises:
        FlexOlmoError: the verb has no such option, or the value has another type.
    """
    from flexolmo_megatron.cli import build_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return build_parser().parse_args(words)
    except SystemExit as end:
        message = said.getvalue().strip().rpartition("error: ")[2] if end.code else "expected options that run it"
        raise FlexOlmoError(f"{where}: {message}") from None
