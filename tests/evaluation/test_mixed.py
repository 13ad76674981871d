"""Texts of passages of several domains."""

import random

import pytest

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.mixed import cut_passages, mix, mixed_text_set
from flexolmo_megatron.evaluation.texts import TextSet

_LETTERS = random.Random(3)


def document(letters: str, size: int) -> str:
    return "".join(_LETTERS.choice(letters) for _ in range(size))


DOMAINS = {
    "news": [document("abc ", 900) for _ in range(6)],
    "math": [document("012 ", 500) for _ in range(12)] + ["too short"],
    "greek": [document("αβγ ", 700) for _ in range(6)],
    "signs": [document("😀☃x", 300) for _ in range(12)],
}


def test_pieces_have_at_most_their_size_and_end_between_characters() -> None:
    assert list(cut_passages("aé☃😀b", lambda: 4)) == ["aé", "☃", "😀", "b"]  # 1 + 2, 3, 4 and 1 bytes
    assert list(cut_passages("aé☃😀b", lambda: 1)) == ["a", "é", "☃", "😀", "b"]
    assert list(cut_passages("", lambda: 4)) == []


def test_passages_are_pieces_of_their_domain_of_the_right_size() -> None:
    texts = mix(DOMAINS, seed=1)
    assert len(texts) > 3
    position = {domain: 0 for domain in DOMAINS}
    for mixed in texts:
        assert mixed.text == "\n\n".join(passage.text for passage in mixed.passages)
        for passage in mixed.passages:
            assert 200 <= len(passage.text.encode("utf-8")) <= 400
            documents = DOMAINS[passage.domain]
            number = next(number for number, text in enumerate(documents) if passage.text in text)
            assert number >= position[passage.domain], "documents are used in order"
            position[passage.domain] = number


def test_every_domain_comes_up_equally_often_and_never_twice_in_a_row() -> None:
    for passages in (2, 3, 4, 5):
        texts = mix(DOMAINS, passages=passages, seed=2)
        for mixed in texts:
            names = [passage.domain for passage in mixed.passages]
            assert len(names) == passages
            assert all(one != two for one, two in zip(names, names[1:], strict=False))
        names = [passage.domain for mixed in texts for passage in mixed.passages]
        counts = [names.count(domain) for domain in DOMAINS]
        assert max(counts) - min(counts) <= 1
    orders = {tuple(passage.domain for passage in mixed.passages) for mixed in mix(DOMAINS, seed=2)}
    assert len(orders) > 1


def test_the_seed_decides() -> None:
    assert mix(DOMAINS, seed=1) == mix(DOMAINS, seed=1)
    assert mix(DOMAINS, seed=1) != mix(DOMAINS, seed=2)
    first = mix({"a": ["a" * 3000], "b": ["b" * 3000]}, seed=0)[0]
    assert [(passage.domain, len(passage.text)) for passage in first.passages] == [
        ("b", 353), ("a", 254), ("b", 283), ("a", 263)]  # the same on any machine


def test_max_bytes() -> None:
    everything = mix(DOMAINS, seed=1)
    sizes = [len(mixed.text.encode("utf-8")) for mixed in everything]
    assert mix(DOMAINS, seed=1, max_bytes=sizes[0] + sizes[1]) == everything[:2]
    assert mix(DOMAINS, seed=1, max_bytes=sizes[0] + sizes[1] - 1) == everything[:1]
    with pytest.raises(FlexOlmoError, match=f"max_bytes = 5: expected at least {sizes[0]}, the size of the first"):
        mix(DOMAINS, seed=1, max_bytes=5)


def test_as_a_set_of_texts() -> None:
    texts = mixed_text_set("mixed", DOMAINS, seed=1, passages=3)
    assert texts == TextSet("mixed", tuple(mixed.text for mixed in mix(DOMAINS, seed=1, passages=3)))


@pytest.mark.parametrize(("domains", "options", "message"), [
    ({"a": ["x" * 999]}, {}, "1 domains to mix: expected at least 2"),
    (DOMAINS, {"passages": 1}, "1 passages in a mixed text: expected at least 2"),
    (DOMAINS, {"smallest": 300, "largest": 303}, "passages of 300 to 303 bytes: expected 1 or more, and at least 4"),
    ({"a": ["x" * 9999], "b": ["y" * 150]}, {}, "domain 'b' have too few passages of 200 to 400 bytes"),
])
def test_what_cannot_be_mixed(domains: dict, options: dict, message: str) -> None:
    with pytest.raises(FlexOlmoError, match=message):
        mix(domains, **options)


def test_a_set_of_texts_knows_its_content() -> None:
    assert TextSet("a", ("x", "yz")).fingerprint == TextSet("b", ("x", "yz")).fingerprint
    assert TextSet("a", ("x", "yz")).fingerprint != TextSet("a", ("xy", "z")).fingerprint
    for texts in ((), ("x", "")):
        with pytest.raises(FlexOlmoError, match="text set 'a': expected at least one text, and none that is empty"):
            TextSet("a", texts)
