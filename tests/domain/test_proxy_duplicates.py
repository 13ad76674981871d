import random

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from flexolmo_megatron.domain.proxy_duplicates import (
    PERMUTATIONS,
    DuplicateIndex,
    band_rows,
    join_signatures,
    signatures,
)
from flexolmo_megatron.domain.words import words
from flexolmo_megatron.errors import FlexOlmoError

VOCABULARY = [f"word{number}" for number in range(3000)]


def text(seed, length=200):
    return " ".join(random.Random(seed).choices(VOCABULARY, k=length))


def changed(original, every, seed=0):
    """One word in ``every`` replaced."""
    result = original.split()
    for place in range(seed % every, len(result), every):
        result[place] = f"other{place}"
    return " ".join(result)


def jaccard(one, other):
    shingles = [{tuple(found[start : start + 3]) for start in range(len(found) - 2)}
                for found in (words(one), words(other))]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def test_words_of_many_scripts():
    assert words("Don't  STOP!\n(ﬁne)") == ["don", "t", "stop", "fine"]
    assert words("漢字とkana かな 한국어, ไทย") == [*"漢字と", "kana", *"かな한국어ไทย"]


def test_copies_in_another_guise_are_found():
    index = DuplicateIndex(signatures([text(0), "Hello, world", "!!! ???", "日本語の文章です"]))
    others = [text(0).upper().replace(" ", "\n  "), "“hello”   World.", "!!!\t???", "日本語 の 文章です。",
              text(1), "hello world again and again", "?? !!", "日本語"]
    copies, near = index.find(signatures(others))
    assert copies.tolist() == [True] * 4 + [False] * 4
    assert not near.any()


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_near_copies_are_found_by_their_true_similarity(threshold):
    originals = [text(seed) for seed in range(60)]
    index = DuplicateIndex(join_signatures([signatures(originals[:30]), signatures(originals[30:])]), threshold)
    found = []
    for every in (5, 10, 15, 20, 30, 60, 150):
        others = [changed(original, every, seed) for seed, original in enumerate(originals)]
        copies, near = index.find(signatures(others))
        assert not copies.any()
        found += [(jaccard(original, other), hit)
                  for original, other, hit in zip(originals, others, near, strict=True)]
    # The estimate's standard error is at most 0.044.
    assert all(hit for true, hit in found if true > threshold + 0.17)
    assert not any(hit for true, hit in found if true < threshold - 0.17)
    assert {hit for _, hit in found} == {True, False}


def test_agrees_with_datasketch():
    """Its index finds the same near-copies among the same signatures."""
    originals = [text(seed, 60) for seed in range(100)]
    others = [changed(original, 3 + seed % 40, seed) for seed, original in enumerate(originals)]
    known, asked = signatures(originals), signatures(others)
    lsh = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // band_rows(0.6), band_rows(0.6)))

    def minhash(row):
        return MinHash(PERMUTATIONS, hashvalues=row, scheme="affine32")

    for number, row in enumerate(known.minhash):
        lsh.insert(number, minhash(row))
    expected = [any(minhash(row).jaccard(minhash(known.minhash[match])) >= 0.6 for match in lsh.query(minhash(row)))
                for row in asked.minhash]
    assert 10 < sum(expected) < 90
    assert DuplicateIndex(known, 0.6).find(asked)[1].tolist() == expected


def test_bands_find_a_pair_at_the_threshold():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.95):
        rows = band_rows(threshold)
        assert 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.99
        assert 1 - (1 - threshold ** (rows + 1)) ** (PERMUTATIONS // (rows + 1)) < 0.99


def test_signatures_do_not_depend_on_company_or_pieces(monkeypatch):
    long = text(5, 3000)
    together, alone = signatures([text(1), long, "a"]), signatures([long])
    np.testing.assert_array_equal(together.minhash[1], alone.minhash[0])
    monkeypatch.setattr("flexolmo_megatron.domain.proxy_duplicates._PIECE", 7)
    np.testing.assert_array_equal(signatures([long]).minhash, alone.minhash)
    # Guards the promise that an index can be used by another process and version.
    assert signatures(["one two three four"]).exact.tolist() == [signatures(["One, two: THREE (four)"]).exact[0]]


def test_nothing_known():
    copies, near = DuplicateIndex(join_signatures([])).find(signatures(["a b c"]))
    assert not copies.any() and not near.any()


@pytest.mark.parametrize("threshold", [0, 1.01, float("nan")])
def test_impossible_threshold(threshold):
    with pytest.raises(FlexOlmoError, match=f"^--jaccard {threshold}: expected a number above 0, at most 1$"):
        DuplicateIndex(signatures(["a"]), threshold)
