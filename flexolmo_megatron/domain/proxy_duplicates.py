"""Copies and near-copies of an owner's documents among others, which must not become proxies.

Two documents are copies if their normalised words are the same, and near-copies if the Jaccard similarity of their sets
of word trigrams, estimated by MinHash (Broder 1997), reaches a threshold. Signatures are datasketch's. The index is not
its ``MinHashLSH``, whose dictionaries take some 10 kB for each document: sorted arrays of band hashes take 0.7 kB.

Not found: a document of the owner quoted within a much longer one, whose Jaccard similarity is low; paraphrases and
translations.

Legend: n documents, P permutations, B bands.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from datasketch import MinHash

from flexolmo_megatron.domain.words import words
from flexolmo_megatron.errors import FlexOlmoError

PERMUTATIONS = 128
"""The estimate's standard error is at most 0.044, the square root of J (1 - J) / 128."""
SHINGLE_WORDS = 3
DEFAULT_JACCARD = 0.7
RECALL = 0.99
"""Chance that a pair whose similarity is just the threshold is compared at all; above it, larger."""
_SEED = 1
_PIECE = 4096
"""Shingles hashed at once, each to P numbers: bounds the memory that a long document takes."""


class Signatures(NamedTuple):
    """What is kept of documents: enough to recognise them, nothing that can be read."""

    exact: np.ndarray
    """Hash of the normalised words, uint64 `[n]`."""
    minhash: np.ndarray
    """uint32 `[n, P]`."""


@cache
def _permutations() -> np.ndarray:
    return MinHash(PERMUTATIONS, seed=_SEED, scheme="affine32").permutations


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def signatures(texts: Sequence[str]) -> Signatures:
    """Compute the signatures of documents. A document of fewer than three words is one shingle."""
    exact = np.empty(len(texts), np.uint64)
    minhash = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for row, text in enumerate(texts):
        found = words(text)
        # A text of symbols alone is compared as it is, so that it can be recognised as well.
        joined = (" ".join(found) if found else "\0" + " ".join(text.split())).encode("utf-8", "surrogatepass")
        exact[row] = int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")
        last = max(1, len(found) - SHINGLE_WORDS + 1)
        shingles = {" ".join(found[start : start + SHINGLE_WORDS]).encode() for start in range(last)}
        if not found:
            shingles = {joined}
        one = MinHash(PERMUTATIONS, hashfunc=_hash32, permutations=_permutations(), scheme="affine32")
        remaining = iter(shingles)
        while piece := list(islice(remaining, _PIECE)):
            one.update_batch(piece)
        minhash[row] = one.hashvalues
    return Signatures(exact, minhash)


def join_signatures(parts: Iterable[Signatures]) -> Signatures:
    """Signatures of all parts' documents, in order."""
    parts = list(parts)
    if not parts:
        return Signatures(np.empty(0, np.uint64), np.empty((0, PERMUTATIONS), np.uint32))
    return Signatures(np.concatenate([part.exact for part in parts]), np.concatenate([part.minhash for part in parts]))


def band_rows(threshold: float) -> int:
    """The most rows of a band (the fewest false candidates) with which a pair at ``threshold`` is found in time."""
    rows = 1
    while 1 - (1 - threshold ** (rows + 1)) ** (PERMUTATIONS // (rows + 1)) >= RECALL:
        rows += 1
    return rows


class DuplicateIndex:
    """Finds copies of a set of documents."""

    def __init__(self, known: Signatures, threshold: float = DEFAULT_JACCARD) -> None:
        """Index the documents ``known``.

        Raises:
            FlexOlmoError: the threshold is outside (0, 1].
        """
        if not 0 < threshold <= 1:
            raise FlexOlmoError(f"--jaccard {threshold}: expected a number above 0, at most 1")
        self._threshold = threshold
        self._exact = np.unique(known.exact)
        self._minhash = known.minhash
        self._rows = band_rows(threshold) if threshold < 1 else PERMUTATIONS
        hashes_BN = self._bands(known.minhash)
        self._order = np.argsort(hashes_BN, axis=1, kind="stable")
        self._sorted = np.take_along_axis(hashes_BN, self._order, axis=1)

    def _bands(self, minhash: np.ndarray) -> np.ndarray:
        """One 64-bit hash for each band `[B, n]`."""
        bands = PERMUTATIONS // self._rows
        values = minhash[:, : bands * self._rows].astype(np.uint64).reshape(len(minhash), bands, self._rows)
        mixed = np.zeros((len(minhash), bands), np.uint64)
        for row in range(self._rows):  # FNV-1a on words; wraps around
            mixed = (mixed ^ values[:, :, row]) * np.uint64(0x100000001B3) + np.uint64(0x9E3779B97F4A7C15)
        return np.ascontiguousarray(mixed.T)

    def find(self, others: Signatures) -> tuple[np.ndarray, np.ndarray]:
        """Return which of ``others`` are copies, and which near-copies but not copies: bool `[n]` each."""
        exact = np.isin(others.exact, self._exact)
        near = np.zeros(len(exact), bool)
        for hashes, known, order in zip(self._bands(others.minhash), self._sorted, self._order, strict=True):
            first, last = np.searchsorted(known, hashes, "left"), np.searchsorted(known, hashes, "right")
            for document in np.flatnonzero((last > first) & ~exact & ~near):
                matches = self._minhash[order[first[document] : last[document]]]
                near[document] = ((matches == others.minhash[document]).mean(axis=1) >= self._threshold).any()
        return exact, near
