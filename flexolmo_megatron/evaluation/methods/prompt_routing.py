"""A classifier reads a part of a text and picks the one dense model that predicts the rest (arXiv 2507.07024, table 1,
prompt-based routing).

The classifier is trained on documents of all owners and public ones side by side, which owners who share no data could
not do: it is a baseline, and a favoured one. A text is read in blocks of at most ``prompt_bytes`` bytes, cut between
tokens. Three forms differ in what a block's tokens are predicted by:

- oracle: one model for all of them, picked from the first block, which that model predicts as well.
- causal: the public model for the first block, then the model that the first block picks.
- blocks, causal: the public model for the first block, then the model that the block before picks.

Legend: n documents or passages.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import numpy as np

from flexolmo_megatron.config.card import PUBLIC
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.domain.proxy_classifier import MAX_CHARACTERS, LinearClassifier
from flexolmo_megatron.domain.sample import reservoir_sample
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods.base import Method, Models, Settings, Variant
from flexolmo_megatron.evaluation.methods.btm import per_text
from flexolmo_megatron.evaluation.methods.store import Store
from flexolmo_megatron.evaluation.mixed import cut_passages
from flexolmo_megatron.evaluation.perplexity import LogProbs
from flexolmo_megatron.evaluation.texts import TextSet
from flexolmo_megatron.training.tokenizer import Tokenizer, load_tokenizer

MAX_PASSAGES = 5000
"""Passages per domain that train the classifier."""


class DomainClassifier:
    """Picks one of several domains: each has a linear classifier on hashed n-grams, against all others."""

    def __init__(self, classifiers: Sequence[LinearClassifier]) -> None:
        self._classifiers = classifiers

    @classmethod
    def train(cls, texts: Mapping[str, Sequence[str]], prompt_bytes: int, seed: int) -> "DomainClassifier":
        """Train on passages of the documents, as long as the prompts.

        Args:
            texts: documents by domain; domains are numbered in this order.
            prompt_bytes: UTF-8 bytes of a passage at most.
            seed: of the sample of passages and the training.

        Raises:
            FlexOlmoError: fewer than two domains, or one of them without documents.
        """
        if len(texts) < 2:
            raise FlexOlmoError(f"documents of {len(texts)} domains to train a classifier: expected at least 2")
        passages: list[str] = []
        domains: list[int] = []
        for number, (name, documents) in enumerate(texts.items()):
            pieces = (piece for document in documents
                      for piece in cut_passages(document[:MAX_CHARACTERS], lambda: prompt_bytes))
            sample = reservoir_sample(pieces, MAX_PASSAGES, seed)
            if not sample:
                raise FlexOlmoError(f"domain {name!r} has no documents to train a classifier: expected at least one")
            passages += sample
            domains += [number] * len(sample)
        labels = np.array(domains)
        return cls([LinearClassifier.train(passages, (labels == number).astype(np.int64), seed)
                    for number in range(len(texts))])

    def choose(self, prompts: Sequence[str]) -> list[int]:
        """Return the number of each prompt's domain `[n]`."""
        return np.argmax([classifier.logits(prompts) for classifier in self._classifiers], axis=0).tolist()


def blocks(tokens: Sequence[int], tokenizer: Tokenizer, size: int) -> Iterator[tuple[int, str]]:
    """Cut tokens into blocks whose texts have at most ``size`` UTF-8 bytes; yields each one's first token and text.

    A single token whose text is longer is a block of its own.
    """
    start = 0
    while start < len(tokens):
        fits, beyond = 1, min(size, len(tokens) - start) + 1  # numbers of tokens
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if len(tokenizer.decode(tokens[start:start + middle]).encode("utf-8")) <= size:
                fits = middle
            else:
                beyond = middle
        yield start, tokenizer.decode(tokens[start:start + fits])
        start += fits


def _choices(tokens: Sequence[int], tokenizer: Tokenizer, classifier: DomainClassifier, size: int,
             form: str) -> np.ndarray:
    """Return the number of the model that predicts each token."""
    cut = list(blocks(tokens, tokenizer, size))
    if form != "blocks":
        cut = cut[:2]
    choices_T = np.zeros(len(tokens), np.int64)  # 0: the public model
    if form == "oracle":
        cut = [cut[0], (0, "")]
    starts = [start for start, _ in cut[1:]]
    if starts:
        for start, chosen in zip(starts, classifier.choose([prompt for _, prompt in cut[:-1]]), strict=True):
            choices_T[start:] = chosen
    return choices_T


def _log_probs(form: str, size: int, variants: Sequence[Variant], trained: Callable[[], DomainClassifier], store: Store,
               texts: TextSet) -> LogProbs:
    tokenizer = load_tokenizer(open_model(variants[0].path).card.tokenizer)
    chosen = []
    for text, log_probs_nT in zip(texts.texts, per_text(store, variants, texts), strict=True):
        choices_T = _choices(tokenizer.encode(text), tokenizer, trained(), size, form)
        chosen.append(log_probs_nT[choices_T, np.arange(len(choices_T))])
    return chosen


_FORMS = {
    "oracle": ("prompt routing oracle", "oracle",
               "a linear classifier reads the first {size} bytes and picks one dense model for the whole text"),
    "causal": ("prompt routing causal", "causal",
               "the public model for the first {size} bytes, then the dense model that a classifier picks from them"),
    "blocks": ("block routing causal", "causal",
               "the public model for the first {size} bytes, then for each {size} bytes the dense model that a "
               "classifier picks from the {size} bytes before"),
}


def prompt_routing(models: Models, settings: Settings) -> list[Method]:
    """The three forms, where there are documents to train the classifier.

    Raises:
        FlexOlmoError: the documents' domains are not the models'.
    """
    if not settings.classifier_texts or not models.dense:
        return []
    names = [PUBLIC, *models.dense]
    if sorted(settings.classifier_texts) != sorted(names):
        raise FlexOlmoError(f"documents to train a classifier for {', '.join(sorted(settings.classifier_texts))}: "
                            f"expected them for {', '.join(sorted(names))}")
    variants = (Variant(models.public), *(Variant(path) for path in models.dense.values()))
    size = settings.prompt_bytes

    @cache
    def trained() -> DomainClassifier:
        return DomainClassifier.train({name: settings.classifier_texts[name] for name in names}, size, settings.seed)

    return [Method(name, "prompt routing", definition.format(size=size), "arXiv 2507.07024, table 1", sees,
                   "1 forward pass", {"public": 1, "owner": len(models.dense)}, variants,
                   partial(_log_probs, form, size, variants, trained))
            for form, (name, sees, definition) in _FORMS.items()]
