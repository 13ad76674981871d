"""Held-out texts of several domains: short passages one after the other, as no single domain's model expects them.

Each passage has 200 to 400 UTF-8 bytes of one document, neighbours are of different domains, and a blank line divides
them. Seed and documents decide everything, on any machine.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.texts import TextSet

SEPARATOR = "\n\n"
SMALLEST, LARGEST = 200, 400
"""UTF-8 bytes of a passage."""
_CHARACTER = 4
"""UTF-8 bytes of a character at most."""


@dataclass(frozen=True)
class Passage:
    """A piece of one document."""

    domain: str
    text: str


@dataclass(frozen=True)
class MixedText:
    """Passages of different domains."""

    passages: tuple[Passage, ...]

    @property
    def text(self) -> str:
        return SEPARATOR.join(passage.text for passage in self.passages)


def cut_passages(text: str, size: Callable[[], int]) -> Iterator[str]:
    """Cut a text into pieces whose UTF-8 bytes are at most what ``size`` returns for each, between characters.

    The last piece is what is left. A character that is longer than its piece may be is a piece of its own.
    """
    data = text.encode("utf-8")
    start = 0
    while start < len(data):
        end = min(start + size(), len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:  # in the middle of a character
            end -= 1
        if end <= start:
            end = start + len(data[start:start + _CHARACTER].decode("utf-8", errors="ignore")[0].encode("utf-8"))
        yield data[start:end].decode("utf-8")
        start = end


def mix(domains: Mapping[str, Iterable[str]], *, passages: int = 4, seed: int = 0, smallest: int = SMALLEST,
        largest: int = LARGEST, max_bytes: int | None = None) -> list[MixedText]:
    """Make mixed texts until a domain has no passage left.

    Every domain comes up equally often, in random order. Documents are used in order; of each, what is left at its end
    and is shorter than ``smallest`` is not used.

    Args:
        domains: held-out documents by domain, at least two.
        passages: in a text.
        seed: of the order of domains and the lengths of passages.
        smallest: UTF-8 bytes of a passage.
        largest: UTF-8 bytes of a passage.
        max_bytes: of all texts together, at most, dividers included; None for all.

    Raises:
        FlexOlmoError: too few domains, impossible numbers, or not enough documents for one text.
    """
    if len(domains) < 2:
        raise FlexOlmoError(f"{len(domains)} domains to mix: expected at least 2")
    if passages < 2:
        raise FlexOlmoError(f"{passages} passages in a mixed text: expected at least 2")
    if not 1 <= smallest <= largest - _CHARACTER:
        raise FlexOlmoError(f"passages of {smallest} to {largest} bytes: expected 1 or more, and at least {_CHARACTER} "
                            "more for the longest, so that it can end between characters")
    # random() alone is promised to stay the same across Python versions.
    uniform = random.Random(seed).random
    pieces = {domain: _passages(texts, smallest, largest, uniform) for domain, texts in domains.items()}
    order = _order(list(domains), uniform)
    mixed: list[MixedText] = []
    total = 0
    while True:
        chosen = []
        for domain in (next(order) for _ in range(passages)):
            if (text := next(pieces[domain], None)) is None:
                if not mixed:
                    raise FlexOlmoError(f"the documents of domain {domain!r} have too few passages of {smallest} to "
                                        f"{largest} bytes for one mixed text: expected more or longer documents")
                return mixed
            chosen.append(Passage(domain, text))
        new = MixedText(tuple(chosen))
        total += len(new.text.encode("utf-8"))
        if max_bytes is not None and total > max_bytes:
            if not mixed:
                raise FlexOlmoError(f"max_bytes = {max_bytes}: expected at least {total}, the size of the first mixed "
                                    "text")
            return mixed
        mixed.append(new)


def mixed_text_set(name: str, domains: Mapping[str, Iterable[str]], **options: int | None) -> TextSet:
    """Return ``mix``'s texts under a name."""
    return TextSet.of(name, (mixed.text for mixed in mix(domains, **options)))


def _passages(texts: Iterable[str], smallest: int, largest: int, uniform: Callable[[], float]) -> Iterator[str]:
    def size() -> int:
        # The first few bytes are slack: a cut moves down by up to 3 bytes, to where a character starts.
        return smallest + _CHARACTER - 1 + int(uniform() * (largest - smallest - _CHARACTER + 2))

    for text in texts:
        for piece in cut_passages(text, size):
            if len(piece.encode("utf-8")) >= smallest:
                yield piece


def _order(domains: list[str], uniform: Callable[[], float]) -> Iterator[str]:
    """Yield all domains again and again, each time in another order, and none twice in a row."""
    last = None
    while True:
        left = list(domains)
        while left:
            options = [domain for domain in left if domain != last]  # leaves one out only as a round starts
            last = options[int(uniform() * len(options))]
            left.remove(last)
            yield last
