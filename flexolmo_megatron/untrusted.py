"""Checking values that a stranger wrote into a JSON file: each wrong one is named in one sentence.

Free text is checked for what could harm whoever stores or prints it, never interpreted.
"""

import json
import re
import unicodedata
from dataclasses import fields
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError, nearest

MAX_TEXT = 4096
"""Longest free text, in characters."""

_HEX = re.compile(r"[0-9a-f]{64}")


def parse_strict_json(data: bytes) -> Any:
    """``json.loads`` without its extensions: no duplicate keys, no NaN or Infinity, UTF-8 only.

    Raises:
        FlexOlmoError: ``data`` is not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise FlexOlmoError(f"key {shown(next(key for key in keys if keys.count(key) > 1))} appears twice")
        return result

    def refuse(constant: str) -> None:
        raise FlexOlmoError(f"{constant} is not a JSON number")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise FlexOlmoError("JSON nested too deeply") from None
    except FlexOlmoError:
        raise
    except ValueError as error:  # also bad UTF-8 and integers of thousands of digits
        raise FlexOlmoError(f"not valid JSON: {error}") from None


def shown(value: Any) -> str:
    """``repr`` of a stranger's value, in at most 80 ASCII characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Return free text with everything that could steer a terminal replaced by its escape."""
    return "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else c.encode("unicode_escape").decode()
                   for c in text)


def check_keys(what: str, values: Any, cls: type) -> None:
    """Refuse anything but a JSON object with exactly the fields of the dataclass ``cls``."""
    if not isinstance(values, dict):
        raise FlexOlmoError(f"{what}: expected a JSON object, got {shown(values)}")
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise FlexOlmoError(f"unknown {what} field {shown(key)}{nearest(key, known)}")
    for key in known:
        if key not in values:
            raise FlexOlmoError(f"{what} field {key!r} is missing")


def check_fields(what: str, values: Any, known: dict[str, type]) -> None:
    """Refuse anything but a JSON object with some of the fields ``known``: texts, numbers from 0, true or false,
    or objects."""
    if not isinstance(values, dict):
        raise FlexOlmoError(f"{what}: expected a JSON object, got {shown(values)}")
    for key, value in values.items():
        if key not in known:
            raise FlexOlmoError(f"unknown {what} field {shown(key)}{nearest(str(key), known)}")
        if known[key] is str:
            check_text(f"{what}.{key}", value)
        elif known[key] is bool:
            if type(value) is not bool:
                raise FlexOlmoError(f"{what}.{key} = {shown(value)}: expected true or false")
        elif known[key] is not dict:
            check_number(f"{what}.{key}", value, known[key], smallest=0, largest=2**63 - 1)


def check_text(what: str, value: Any) -> None:
    """Refuse anything but a text of at most ``MAX_TEXT`` characters without control characters."""
    if not isinstance(value, str):
        raise FlexOlmoError(f"{what} = {shown(value)}: expected text")
    if len(value) > MAX_TEXT:
        raise FlexOlmoError(f"{what} has {len(value)} characters: expected at most {MAX_TEXT}")
    bad = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"), None)
    if bad is not None:
        raise FlexOlmoError(f"{what} holds the control character {ascii(bad)}: expected plain text")


def check_digest(what: str, value: Any) -> None:
    """Refuse anything but a SHA-256 in hexadecimal."""
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise FlexOlmoError(f"{what} = {shown(value)}: expected 64 lower-case hexadecimal digits")


def check_number(what: str, value: Any, kind: type, *, smallest: float, largest: float) -> None:
    """Refuse anything but a number of ``kind`` (int, or float, which an int serves as, too) within the limits."""
    accepted = (int,) if kind is int else (int, float)
    if type(value) not in accepted or not smallest <= value <= largest:  # false for NaN and infinity, too
        noun = "a whole number" if kind is int else "a number"
        raise FlexOlmoError(f"{what} = {shown(value)}: expected {noun} from {smallest} to {largest}")
