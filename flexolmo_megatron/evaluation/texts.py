"""A set of held-out texts with a name, in memory: what several models and methods are measured on alike."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from flexolmo_megatron.errors import FlexOlmoError


@dataclass(frozen=True)
class TextSet:
    """Held-out texts of one domain, or of several within each text (``evaluation/mixed.py``)."""

    name: str
    """What the table calls it."""
    texts: tuple[str, ...]
    """One document each, none of them empty."""

    def __post_init__(self) -> None:
        if not self.texts or not all(self.texts):
            raise FlexOlmoError(f"text set {self.name!r}: expected at least one text, and none that is empty")

    @classmethod
    def of(cls, name: str, texts: Iterable[str]) -> "TextSet":
        """Take all of an iterable."""
        return cls(name, tuple(texts))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the texts; their name has no part in it."""
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()
