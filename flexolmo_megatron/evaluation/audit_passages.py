"""Passages of a corpus that an extraction attack tries to get out of a model: a sample that a seed determines.

A passage is a window of a document: its first tokens are given to the model, the others are what it should not know.
Which documents are drawn depends on their text and the seed alone, not on their order, and copies of a document count
once.
"""

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.hashing import hash64
from flexolmo_megatron.training.documents import Document
from flexolmo_megatron.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class Passage:
    """A part of a document."""

    key: int
    """Hash of the document's text and the seed, 64 bits."""
    place: str
    """File and line."""
    first: int
    """Its first token, counted in the document from 0."""
    tokens: tuple[int, ...]
    """Its token ids."""


def sample_passages(documents: Iterable[Document], tokenizer: Tokenizer, *, count: int, length: int, shortest: int,
                    seed: int) -> list[Passage]:
    """Draw documents, and a passage from each, as allenai/FlexOlmo does (src/scripts/utils/extraction_analysis.py).

    Args:
        documents: of the corpus; they are read once, and only those that may be drawn are tokenized.
        tokenizer: the model's.
        count: documents to draw, each equally likely; all where there are fewer.
        length: tokens of a passage, at most: to the end of a document that is shorter.
        shortest: tokens of a document, at least; shorter ones are not drawn.
        seed: of the sample.

    Returns:
        The passages, by ``key``.

    Raises:
        FlexOlmoError: no document is long enough.
    """
    drawn: list[tuple[int, Passage]] = []  # a heap: the largest key first
    keys: set[int] = set()
    for document in documents:
        key = hash64(seed, document.text)  # those with the smallest are drawn
        if key in keys or (len(drawn) == count and key >= -drawn[0][0]):
            continue
        tokens = tokenizer.encode(document.text)
        if len(tokens) < shortest:
            continue
        # random() alone is promised to stay the same across Python versions, randrange() is not.
        first = int(random.Random(key).random() * max(len(tokens) - length, 1))
        passage = Passage(key, f"{document.file}:{document.line}", first, tuple(tokens[first:first + length]))
        keys.add(key)
        if len(drawn) < count:
            heapq.heappush(drawn, (-key, passage))
        else:
            keys.remove(-heapq.heapreplace(drawn, (-key, passage))[0])
    if not drawn:
        raise FlexOlmoError(f"no document has {shortest} tokens or more: expected at least one that is so long")
    return sorted((passage for _, passage in drawn), key=lambda passage: passage.key)
