"""Bits per byte of a stand-in for a model whose probabilities are known."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.perplexity import evaluate_documents, limit_bytes
from flexolmo_megatron.training.tokenizer import ByteTokenizer

VOCAB = 300


class FakeModel:
    """Computes its logits `[b, s, V]` with a function of the tokens `[b, s]`, and keeps what it was asked for."""

    def __init__(self, compute: Callable[[Tensor], Tensor], length: int = 16) -> None:
        self.compute = compute
        self.config = ModelConfig(max_position_embeddings=length)
        self.tokenizer = ByteTokenizer()
        self.module = nn.Module()
        self.asked: list[tuple[Tensor, Sequence[str] | None]] = []

    def logits(self, tokens: Tensor, experts: Sequence[str] | None = None, *, exact: bool = True) -> Tensor:
        assert not exact, "one sequence at a time is too slow"
        assert tokens.shape[1] <= self.config.max_position_embeddings
        self.asked.append((tokens, experts))
        return self.compute(tokens)


def uniform(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, VOCAB)


def contextual(tokens: Tensor) -> Tensor:
    """Logits that depend on all tokens up to this one and on nothing later."""
    context = (tokens * torch.arange(1, tokens.shape[1] + 1)).cumsum(dim=1)
    return torch.sin(context[..., None] * 0.37 + torch.arange(VOCAB) * 1.7)


def repeats(tokens: Tensor) -> Tensor:
    """Probability 1/2 for the latest token again, and the other half evenly for all the others."""
    probs = torch.full((*tokens.shape, VOCAB), 0.5 / (VOCAB - 1))
    return probs.scatter(2, tokens[..., None], 0.5).log()


REPEAT, OTHER = 1.0, math.log2(2 * (VOCAB - 1))
"""What ``repeats`` pays for a token, in bits."""


def test_uniform_model_takes_the_log_of_its_vocabulary_per_token() -> None:
    score = evaluate_documents(FakeModel(uniform), ["abc", "a longer document than one window", "é"])
    assert score.bits_per_byte == pytest.approx(math.log2(VOCAB), abs=1e-6)
    assert (score.tokens, score.text_bytes, score.documents) == (38, 38, 3)
    assert score.standard_error == pytest.approx(0, abs=1e-6)


def test_known_probabilities_by_hand() -> None:
    # After the end-of-document token: "a" is new, "a" repeats, "b" is new. And: three bytes, two of them repeats.
    score = evaluate_documents(FakeModel(repeats), ["aab", "ccc"])
    first, second = 2 * OTHER + REPEAT, OTHER + 2 * REPEAT
    assert score.bits == pytest.approx(first + second, rel=1e-6)
    assert score.bits_per_byte == pytest.approx((first + second) / 6, rel=1e-6)
    # Equal lengths: the ratio is the mean of the documents' bits per byte, and so is its error.
    assert score.standard_error == pytest.approx(abs(first - second) / 3 / 2, rel=1e-5)


def test_bytes_and_not_characters_or_tokens_are_counted() -> None:
    class Words(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [len(word) for word in text.split()]

    model = FakeModel(uniform)
    model.tokenizer = Words()
    score = evaluate_documents(model, ["zwei Wörter"])
    assert (score.tokens, score.text_bytes) == (2, 12)
    assert score.bits_per_byte == pytest.approx(2 * math.log2(VOCAB) / 12, rel=1e-6)
    assert score.standard_error is None


@pytest.mark.parametrize("batch_tokens", [1, 20, 50, 8192])
def test_neither_batching_nor_padding_nor_neighbours_change_the_result(batch_tokens: int) -> None:
    texts = ["x" * size + "yz" for size in (1, 9, 3, 40, 14, 2, 1)]
    alone = [evaluate_documents(FakeModel(contextual), [text]).bits for text in texts]
    together = evaluate_documents(FakeModel(contextual), texts, batch_tokens=batch_tokens)
    assert together.bits == pytest.approx(sum(alone), rel=1e-6)
    again = evaluate_documents(FakeModel(contextual), texts, batch_tokens=batch_tokens)
    assert again == together


def test_windows_predict_every_token_once_from_at_least_half_a_window() -> None:
    text = "abcdefghijklmnopqrstu"  # 21 tokens
    tokens = [256, *text.encode()]
    model = FakeModel(contextual, length=8)
    score = evaluate_documents(model, [text], batch_tokens=8)

    def bits(window: list[int], targets: range) -> float:
        logits = contextual(torch.tensor([window]))[0].log_softmax(dim=-1)
        return -sum(logits[at, tokens[start + at + 1]].item() for at in targets) / math.log(2)

    expected = 0.0
    for start, targets in ((0, range(8)), (4, range(4, 8)), (8, range(4, 8)), (12, range(4, 8)), (13, range(7, 8))):
        expected += bits(tokens[start:start + 8], targets)
    assert score.tokens == 21
    assert score.bits == pytest.approx(expected, rel=1e-6)
    assert [asked.shape for asked, _ in model.asked] == [(1, 8)] * 5


def test_a_document_of_exactly_one_window_is_not_cut() -> None:
    model = FakeModel(contextual, length=8)
    assert evaluate_documents(model, ["abcdefgh"]).tokens == 8
    assert [asked.shape for asked, _ in model.asked] == [(1, 8)]


def test_the_smallest_window() -> None:
    assert evaluate_documents(FakeModel(repeats, length=1), ["aab"]).bits == pytest.approx(2 * OTHER + REPEAT, rel=1e-6)


def test_batches_stay_within_their_tokens_and_go_from_long_to_short() -> None:
    model = FakeModel(contextual)
    evaluate_documents(model, ["x" * size for size in (3, 16, 2, 10, 4)], batch_tokens=20)
    assert [asked.shape for asked, _ in model.asked] == [(1, 16), (2, 10), (2, 3)]


def test_experts_are_handed_to_the_model_and_progress_counts_tokens() -> None:
    model, seen = FakeModel(uniform), []
    evaluate_documents(model, ["abc", "x" * 40], experts=["public", "math"], batch_tokens=32, progress=seen.append)
    assert {tuple(experts) for _, experts in model.asked} == {("public", "math")}
    assert sum(seen) == 43


def test_max_bytes_cuts_the_last_document_between_characters() -> None:
    assert list(limit_bytes(["abc", "déf", "ghi"], 5)) == ["abc", "d"]  # half of é would be byte 5
    assert list(limit_bytes(["abc", "déf", "ghi"], 6)) == ["abc", "dé"]
    assert list(limit_bytes(["abc", "def"], 3)) == ["abc"]
    assert list(limit_bytes(["abc", "def"], None)) == ["abc", "def"]
    assert evaluate_documents(FakeModel(uniform), ["abc", "déf", "ghi"], max_bytes=5).text_bytes == 4


def test_no_more_documents_are_read_than_max_bytes_needs() -> None:
    def texts() -> Sequence[str]:
        yield "abc"
        raise AssertionError("read on")

    assert evaluate_documents(FakeModel(uniform), texts(), max_bytes=3).documents == 1


def test_nothing_to_evaluate() -> None:
    with pytest.raises(FlexOlmoError, match="no document to evaluate"):
        evaluate_documents(FakeModel(uniform), [])


def test_a_model_that_gives_nan_is_refused() -> None:
    def damaged(tokens: Tensor) -> Tensor:
        return uniform(tokens).masked_fill((tokens == ord("b"))[..., None], math.nan)

    with pytest.raises(FlexOlmoError, match="log-likelihood of document 2 is nan: expected a finite number"):
        evaluate_documents(FakeModel(damaged), ["ax", "bx"])
