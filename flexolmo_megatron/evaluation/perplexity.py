"""Bits per byte: how many bits a model needs for each UTF-8 byte of a text. Lower is better.

It is the negative log2-likelihood of all tokens of the documents over the number of their bytes, so models with
different tokenizers compare.

- Each document is evaluated on its own, after one end-of-document token, which is what precedes it in training. The
  end-of-document token itself is not predicted: it stands for no byte.
- A document longer than the model's sequence length L is evaluated in windows of L tokens that advance by L/2. Every
  token is predicted once, and (but for the first L tokens) from at least L/2 tokens of context.
- Documents are batched by length and padded on the right, where causal attention keeps the padding from every token
  that counts. Batching changes results by rounding only.

Legend: b sequences of a batch, s tokens of a sequence, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.routing import RoutingRecorder
from flexolmo_megatron.inference.model import Model

DEFAULT_BATCH_TOKENS = 8192
_SORTED_TOGETHER = 2048
"""How many windows are held and sorted by length; bounds both padding and memory."""


@dataclass(frozen=True)
class DomainScore:
    """What one model needs for the documents of one domain."""

    bits: float
    """Negative log2-likelihood of all tokens."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    tokens: int
    """Tokens that were predicted."""
    documents: int
    """Number of documents."""
    standard_error: float | None
    """Of ``bits_per_byte``, over documents; None for a single document."""

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.text_bytes


class _Window(NamedTuple):
    document: int
    tokens: list[int]
    """The inputs and, last, the target of the last input."""
    first: int
    """The first input whose prediction counts; those before are context."""


def limit_bytes(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """The first ``max_bytes`` UTF-8 bytes of ``texts``; the last text is cut before a character that does not fit."""
    left = math.inf if max_bytes is None else max_bytes
    for text in texts:
        size = len(text.encode("utf-8"))
        if size > left:
            text = text.encode("utf-8")[:int(left)].decode("utf-8", errors="ignore")
            left = 0
        else:
            left -= size
        if text:
            yield text
        if left == 0:
            return


def _windows(document: int, tokens: list[int], eod: int, length: int) -> Iterator[_Window]:
    """Cut a document into windows of at most ``length`` inputs that predict each of its tokens once."""
    stream = [eod, *tokens]
    stride = max(1, length // 2)
    done = 0
    while done < len(tokens):
        end = min(done + (stride if done else length), len(tokens))
        start = max(0, end - length)
        yield _Window(document, stream[start:end + 1], done - start)
        done = end


def _nll(model: Model, batch: list[_Window], pad: int, experts: Sequence[str] | None,
         recorder: RoutingRecorder | None) -> list[float]:
    """Bits that each window's own predictions take."""
    longest = max(len(window.tokens) for window in batch) - 1
    tokens_bs = torch.full((len(batch), longest), pad)
    counted_bs = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, window in enumerate(batch):
        size = len(window.tokens) - 1
        tokens_bs[row, :size] = torch.tensor(window.tokens[:-1])
        counted_bs[row, window.first:size] = True
    logits_bsV = model.logits(tokens_bs, experts, exact=False)
    if recorder:
        recorder.add(counted_bs)
    bits = []
    for window, logits_sV in zip(batch, logits_bsV, strict=True):  # one at a time: a vocabulary is large
        targets = torch.tensor(window.tokens[window.first + 1:], device=logits_sV.device)
        predictions = logits_sV[window.first:len(window.tokens) - 1]
        nll = torch.nn.functional.cross_entropy(predictions, targets, reduction="none")
        bits.append(nll.double().sum().item() / math.log(2))
    return bits


def _standard_error(bits: list[float], sizes: list[int]) -> float | None:
    """Of the ratio of sums, by linearisation (Cochran, Sampling Techniques, 1977, section 6.3)."""
    count = len(bits)
    if count < 2:
        return None
    ratio = math.fsum(bits) / sum(sizes)
    residuals = math.fsum((b - ratio * size) ** 2 for b, size in zip(bits, sizes, strict=True))
    return math.sqrt(residuals * count / (count - 1)) / sum(sizes)


def evaluate_documents(
    model: Model,
    texts: Iterable[str],
    *,
    experts: Sequence[str] | None = None,
    max_bytes: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    recorder: RoutingRecorder | None = None,
    progress: Callable[[int], None] | None = None,
) -> DomainScore:
    """Measure the bits per byte of documents.

    Args:
        model: dense, merged or pair.
        texts: one document each, not empty.
        experts: the only experts to use, by name, "public" among them; None for all.
        max_bytes: UTF-8 bytes to evaluate, from the first document on; None for all.
        batch_tokens: tokens, with padding, that the model computes at a time; at least one sequence.
        recorder: of this model, within its ``with`` block; adds up the experts that are chosen to predict the tokens.
        progress: called after each batch with the number of tokens that it predicted.

    Raises:
        FlexOlmoError: there is no document, or the model's likelihood of one is not a finite number.
    """
    length = model.config.max_position_embeddings
    tokenizer = model.tokenizer
    bits: list[float] = []
    sizes: list[int] = []
    count = 0

    def windows() -> Iterator[_Window]:
        nonlocal count
        for document, text in enumerate(limit_bytes(texts, max_bytes)):
            tokens = tokenizer.encode(text)
            count += len(tokens)
            bits.append(0.0)
            sizes.append(len(text.encode("utf-8")))
            yield from _windows(document, tokens, tokenizer.eod, length)

    stream = windows()
    while held := list(itertools.islice(stream, _SORTED_TOGETHER)):
        held.sort(key=lambda window: len(window.tokens))
        while held:
            size = max(1, batch_tokens // (len(held[-1].tokens) - 1))
            batch = held[-size:][::-1]
            del held[-size:]
            for window, value in zip(batch, _nll(model, batch, tokenizer.eod, experts, recorder), strict=True):
                if not math.isfinite(value):
                    raise FlexOlmoError(f"the model's log-likelihood of document {window.document + 1} is {value}: "
                                        "expected a finite number; are its weights damaged?")
                bits[window.document] += value
            if progress:
                progress(sum(len(window.tokens) - 1 - window.first for window in batch))
    if not sizes:
        raise FlexOlmoError("no document to evaluate: expected at least one that is not empty")
    return DomainScore(math.fsum(bits), sum(sizes), count, len(sizes), _standard_error(bits, sizes))
