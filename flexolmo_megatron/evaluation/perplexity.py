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

import numpy as np
import torch
from torch import Tensor

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


LogProbs = list[np.ndarray]
"""Of each document in turn, the natural logarithm of the probability of each of its tokens, float32 `[tokens]`."""


class Window(NamedTuple):
    """A part of a document that a model sees at once."""

    document: int
    """Number of the document, from 0."""
    tokens: list[int]
    """The inputs and, last, the target of the last input."""
    first: int
    """The first input whose prediction counts; those before are context."""
    position: int
    """Of the token that the first such input predicts, in its document, from 0."""

    @property
    def counted(self) -> slice:
        """The inputs whose predictions count."""
        return slice(self.first, len(self.tokens) - 1)

    @property
    def places(self) -> slice:
        """Positions in the document that they predict."""
        return slice(self.position, self.position + len(self.tokens) - 1 - self.first)


class Batch(NamedTuple):
    """Windows that are computed together, padded on the right."""

    windows: list[Window]
    tokens_bs: Tensor
    """The inputs."""
    counted_bs: Tensor
    """True where a prediction counts."""

    @classmethod
    def of(cls, windows: list[Window], pad: int) -> "Batch":
        """Pad with ``pad``."""
        longest = max(len(window.tokens) for window in windows) - 1
        tokens_bs = torch.full((len(windows), longest), pad)
        counted_bs = torch.zeros(len(windows), longest, dtype=torch.bool)
        for row, window in enumerate(windows):
            tokens_bs[row, :len(window.tokens) - 1] = torch.tensor(window.tokens[:-1])
            counted_bs[row, window.counted] = True
        return cls(windows, tokens_bs, counted_bs)

    def log_probs(self, logits_bsV: Tensor) -> list[Tensor]:
        """Of each window, the log-probabilities of the tokens whose predictions count."""
        values = []
        for window, logits_sV in zip(self.windows, logits_bsV, strict=True):  # one at a time: a vocabulary is large
            targets = torch.tensor(window.tokens[window.first + 1:], device=logits_sV.device)
            values.append(-torch.nn.functional.cross_entropy(logits_sV[window.counted], targets, reduction="none"))
        return values


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


def _windows(document: int, tokens: list[int], eod: int, length: int) -> Iterator[Window]:
    """Cut a document into windows of at most ``length`` inputs that predict each of its tokens once."""
    stream = [eod, *tokens]
    stride = max(1, length // 2)
    done = 0
    while done < len(tokens):
        end = min(done + (stride if done else length), len(tokens))
        start = max(0, end - length)
        yield Window(document, stream[start:end + 1], done - start, done)
        done = end


def batches(documents: Iterable[list[int]], eod: int, length: int, batch_tokens: int) -> Iterator[Batch]:
    """Cut documents into windows and batch those of similar length, from long to short.

    Args:
        documents: token ids of each.
        eod: the token that comes before each.
        length: tokens of a window at most.
        batch_tokens: tokens of a batch at most, with padding; at least one window.
    """
    stream = itertools.chain.from_iterable(
        _windows(number, tokens, eod, length) for number, tokens in enumerate(documents))
    while held := list(itertools.islice(stream, _SORTED_TOGETHER)):
        held.sort(key=lambda window: len(window.tokens))
        while held:
            size = max(1, batch_tokens // (len(held[-1].tokens) - 1))
            yield Batch.of(held[-size:][::-1], eod)
            del held[-size:]


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
    bits: list[float] = []
    sizes: list[int] = []
    count = 0

    def documents() -> Iterator[list[int]]:
        nonlocal count
        for text in limit_bytes(texts, max_bytes):
            tokens = model.tokenizer.encode(text)
            count += len(tokens)
            bits.append(0.0)
            sizes.append(len(text.encode("utf-8")))
            yield tokens

    for window, log_probs in _predictions(model, documents(), experts, batch_tokens, recorder, progress):
        bits[window.document] -= log_probs.double().sum().item() / math.log(2)
    if not sizes:
        raise FlexOlmoError("no document to evaluate: expected at least one that is not empty")
    return _domain_score(bits, sizes, count)


def document_log_probs(
    model: Model,
    texts: Sequence[str],
    *,
    experts: Sequence[str] | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    recorder: RoutingRecorder | None = None,
    progress: Callable[[int], None] | None = None,
) -> LogProbs:
    """Return the log-probability of each token of each text, in the windows of ``evaluate_documents``, whose arguments
    these are.

    Raises:
        FlexOlmoError: the model's likelihood of a document is not a finite number.
    """
    documents = [model.tokenizer.encode(text) for text in texts]
    values = [np.empty(len(tokens), np.float32) for tokens in documents]
    for window, log_probs in _predictions(model, documents, experts, batch_tokens, recorder, progress):
        values[window.document][window.places] = log_probs.cpu().numpy()
    return values


def _predictions(model: Model, documents: Iterable[list[int]], experts: Sequence[str] | None, batch_tokens: int,
                 recorder: RoutingRecorder | None,
                 progress: Callable[[int], None] | None) -> Iterator[tuple[Window, Tensor]]:
    """Yield each window with the log-probabilities of the tokens that count."""
    length = model.config.max_position_embeddings
    for batch in batches(documents, model.tokenizer.eod, length, batch_tokens):
        logits_bsV = model.logits(batch.tokens_bs, experts, exact=False)
        if recorder:
            recorder.add(batch.counted_bs)
        for window, log_probs in zip(batch.windows, batch.log_probs(logits_bsV), strict=True):
            total = log_probs.sum().item()
            if not math.isfinite(total):
                raise FlexOlmoError(f"the model's log-likelihood of document {window.document + 1} is {total}: "
                                    "expected a finite number; are its weights damaged?")
            yield window, log_probs
        if progress:
            progress(int(batch.counted_bs.sum()))


def _domain_score(bits: list[float], sizes: list[int], tokens: int) -> DomainScore:
    return DomainScore(math.fsum(bits), sum(sizes), tokens, len(sizes), _standard_error(bits, sizes))


def score_log_probs(texts: Sequence[str], log_probs: LogProbs) -> DomainScore:
    """Return the bits per byte that log-probabilities of all tokens of ``texts`` amount to."""
    bits = [-values.astype(np.float64).sum().item() / math.log(2) for values in log_probs]
    return _domain_score(bits, [len(text.encode("utf-8")) for text in texts], sum(map(len, log_probs)))
