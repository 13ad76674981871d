"""Routing of whole texts to one dense model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from flexolmo_megatron.convert.model import save_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods import Models, Settings, Store, TextSet, Variant, build_methods
from flexolmo_megatron.evaluation.methods.prompt_routing import DomainClassifier, _choices, blocks
from flexolmo_megatron.training.tokenizer import ByteTokenizer
from tests.random_models import random_model

TEXTS = {
    "public": ["the minister said on friday that the vote was lost", "shares of the company fell by two percent"] * 4,
    "math": ["x + 3 = 7 so x = 4", "12 * 4 = 48 and 48 / 6 = 8", "9 - 3 = 6 , 6 + 6 = 12"] * 4,
    "code": ["def f(a): return [a]", "import os; print(os.name)", "class A: pass\nfor i in b: i()"] * 4,
}


class ByFirstLetter:
    """Picks model 1 for prompts that begin with x, model 2 for those with y, else model 0."""

    def choose(self, prompts: Sequence[str]) -> list[int]:
        assert prompts
        return [" xy".find(prompt[0]) if prompt[0] in "xy" else 0 for prompt in prompts]


def choices(text: str, form: str, size: int = 2) -> list[int]:
    tokenizer = ByteTokenizer()
    return _choices(tokenizer.encode(text), tokenizer, ByFirstLetter(), size, form).tolist()


def test_blocks_end_between_tokens_and_have_at_most_their_bytes() -> None:
    class Words(ByteTokenizer):
        """A token is a word, given by its number of letters."""

        def decode(self, ids: Sequence[int]) -> str:
            return "".join("w" * size for size in ids)

    assert list(blocks([1, 2, 3, 9, 4], Words(), 4)) == [(0, "www"), (2, "www"), (3, "w" * 9), (4, "wwww")]
    assert list(blocks(list(b"abcde"), ByteTokenizer(), 2)) == [(0, "ab"), (2, "cd"), (4, "e")]
    assert list(blocks([], ByteTokenizer(), 2)) == []


def test_who_predicts_what() -> None:
    assert choices("xaybcd", "oracle") == [1] * 6
    assert choices("xaybcd", "causal") == [0, 0, 1, 1, 1, 1]
    assert choices("xaybcd", "blocks") == [0, 0, 1, 1, 2, 2]
    assert choices("x", "oracle") == [1]
    assert choices("x", "causal") == choices("x", "blocks") == [0]


@pytest.mark.parametrize("form", ["causal", "blocks"])
def test_no_token_is_predicted_by_a_model_that_it_has_chosen(form: str) -> None:
    text = "xaybzc"
    for place in range(len(text)):
        for letter in "xyz":
            changed = text[:place] + letter + text[place + 1:]
            assert choices(changed, form)[:place + 1] == choices(text, form)[:place + 1]


def test_the_classifier_tells_domains_apart() -> None:
    classifier = DomainClassifier.train(TEXTS, 24, seed=0)
    prompts = ["the vote on friday", "7 + 5 = 12 so", "def g(b): return"]
    assert classifier.choose(prompts) == [0, 1, 2]
    assert DomainClassifier.train(TEXTS, 24, seed=0).choose(prompts[::-1]) == [2, 1, 0]


def test_methods_take_the_chosen_model_s_numbers(tmp_path: Path) -> None:
    for seed, name in enumerate(TEXTS):
        save_model(random_model("dense", seed=seed), tmp_path / name, "megatron")
    models = Models(tmp_path / "public", {name: tmp_path / name for name in ("math", "code")})
    methods = build_methods(models, Settings(classifier_texts=TEXTS, prompt_bytes=12), ["prompt routing"])
    assert [(method.name, method.sees) for method in methods] == [
        ("prompt routing oracle", "oracle"), ("prompt routing causal", "causal"), ("block routing causal", "causal")]
    assert methods[1].definition == ("the public model for the first 12 bytes, then the dense model that a classifier "
                                     "picks from them")
    store = Store(tmp_path / "store")
    texts = TextSet("mixed", ("def f(a): return x + 3 = 7 so x", "48 / 6 = 8, 9 - 3 = 6"))
    public, math, code = ([part for part in store.log_probs(Variant(tmp_path / name), texts)] for name in TEXTS)
    oracle, causal, block = (method.log_probs(store, texts) for method in methods)
    np.testing.assert_array_equal(oracle[0], code[0])
    np.testing.assert_array_equal(oracle[1], math[1])
    np.testing.assert_array_equal(causal[0], np.append(public[0][:12], code[0][12:]))
    np.testing.assert_array_equal(block[1], np.append(public[1][:12], math[1][12:]))
    np.testing.assert_array_equal(block[0][:24], causal[0][:24])


def test_domains_and_owners_must_agree(tmp_path: Path) -> None:
    settings = Settings(classifier_texts={"public": ["a"], "law": ["b"]})
    models = Models(tmp_path, {"math": tmp_path})
    with pytest.raises(FlexOlmoError, match="classifier for law, public: expected them for math, public"):
        build_methods(models, settings, ["prompt routing"])
    with pytest.raises(FlexOlmoError, match="domain 'math' has no documents to train a classifier"):
        DomainClassifier.train({"public": ["a"], "math": []}, 10, 0)
    with pytest.raises(FlexOlmoError, match="documents of 1 domains to train a classifier: expected at least 2"):
        DomainClassifier.train({"public": ["a"]}, 10, 0)
    assert build_methods(models, Settings(), ["prompt routing"]) == []
