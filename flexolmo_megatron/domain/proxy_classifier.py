"""Which documents look like an owner's: the classifiers of proxy selection, how they are trained and measured.

A classifier gives each document a logit; its sigmoid is the chance that the document is the owner's rather than public
if both are equally frequent. The linear one is here, the neural one in proxy_encoder.py.

Legend: n documents.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flexolmo_megatron.domain.words import TOKEN_PATTERN, words
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file

LINEAR = "linear"
"""Name of the classifier on hashed n-grams."""
MAX_CHARACTERS = 10_000
"""The rest of a longer document is not looked at by a classifier: topic and style show earlier."""
HELD_OUT = 0.1
"""Share of the distinct documents of each side that measure the classifier instead of training it."""
MIN_DOCUMENTS = 10
"""Fewest distinct documents of a side."""
FEATURES = 2**20
NGRAMS = (1, 2)
_WEIGHTS = "linear.npy"


class Classifier(Protocol):
    """What gives documents logits. One document's does not depend on the others of its batch, beyond rounding."""

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `[n]`."""
        ...

    def save(self, folder: Path) -> None:
        """Keep it for ``load_classifier``; this process and its user alone ever read it."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it is, for the report."""
        ...


class LinearClassifier:
    """Logistic regression on the hashed word 1- and 2-grams of a document, weighted to equal classes."""

    def __init__(self, weights: np.ndarray) -> None:
        """Take the weights of the features and the intercept, float32 `[FEATURES + 1]`."""
        self._weights = weights

    @staticmethod
    def train(texts: Sequence[str], labels: np.ndarray, seed: int) -> "LinearClassifier":
        """Train on documents, label 1 for the owner's, by averaged stochastic gradient descent."""
        from sklearn.linear_model import SGDClassifier

        model = SGDClassifier(loss="log_loss", alpha=1e-5, max_iter=10, tol=None, class_weight="balanced", average=True,
                              random_state=seed % 2**32)
        model.fit(LinearClassifier._vectorizer().transform(texts), labels)
        return LinearClassifier(np.append(model.coef_[0], model.intercept_[0]).astype(np.float32))

    @staticmethod
    def _vectorizer() -> Any:
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(n_features=FEATURES, ngram_range=NGRAMS, token_pattern=TOKEN_PATTERN,
                                 alternate_sign=False, dtype=np.float32)

    @cached_property
    def _transform(self) -> Any:
        return self._vectorizer().transform

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `[n]`."""
        return np.asarray(self._transform(texts) @ self._weights[:-1] + self._weights[-1], np.float32)

    def save(self, folder: Path) -> None:
        """Write the weights."""
        with atomic_file(folder / _WEIGHTS) as file:
            np.save(file, self._weights)

    def describe(self) -> dict[str, Any]:
        """What it is."""
        return {"name": LINEAR, "features": FEATURES, "ngrams": list(NGRAMS)}


def load_classifier(name: str, folder: Path) -> Classifier:
    """Load what ``Classifier.save`` wrote."""
    if name == LINEAR:
        return LinearClassifier(np.load(folder / _WEIGHTS, allow_pickle=False))
    from flexolmo_megatron.domain.proxy_encoder import EncoderClassifier

    return EncoderClassifier.load(folder)


@dataclass(frozen=True)
class Split:
    """Documents to train a classifier and to measure it: copies of a document are on the same side."""

    train: list[str]
    train_labels: np.ndarray
    """1 for the owner's, 0 for public ones, int64 `[len(train)]`."""
    held_out: list[str]
    held_out_labels: np.ndarray


def split_documents(owner: Sequence[str], public: Sequence[str], seed: int) -> Split:
    """Set aside ``HELD_OUT`` of the distinct documents of each side; hashes of their words and the seed choose.

    Of documents that occur several times one is kept, and one that both sides have is the owner's: a copy among the
    public documents would be an example of both classes.

    Raises:
        FlexOlmoError: fewer than ``MIN_DOCUMENTS`` are left of a side.
    """
    sides: list[list[str]] = []
    seen: set[bytes] = set()
    for side, whose in ((owner, "the owner's"), (public, "the public")):
        distinct: dict[bytes, str] = {}
        for text in side:
            text = text[:MAX_CHARACTERS]
            key = hashlib.blake2b(" ".join(words(text)).encode("utf-8", "surrogatepass"), digest_size=16,
                                  key=str(seed).encode()).digest()
            if key not in seen:
                distinct[key] = text
        if len(distinct) < MIN_DOCUMENTS:
            raise FlexOlmoError(f"{len(distinct)} distinct documents on {whose} side: expected at least "
                                f"{MIN_DOCUMENTS} to train a classifier")
        seen |= distinct.keys()
        sides.append([distinct[key] for key in sorted(distinct)])
    cuts = [max(1, round(HELD_OUT * len(side))) for side in sides]
    held_out = [side[:cut] for side, cut in zip(sides, cuts, strict=True)]
    train = [side[cut:] for side, cut in zip(sides, cuts, strict=True)]
    labels = [np.repeat([1, 0], [len(side) for side in part]) for part in (train, held_out)]
    return Split(train[0] + train[1], labels[0], held_out[0] + held_out[1], labels[1])


@dataclass(frozen=True)
class Quality:
    """How well a classifier tells held-out documents apart."""

    accuracy: float
    """Mean of both classes' shares of documents on the right side of a logit of 0: chance is 0.5."""
    auc: float
    """Area under the ROC curve: the chance that an owner's document has a larger logit than a public one."""
    owner_documents: int
    public_documents: int


def measure(logits: np.ndarray, labels: np.ndarray) -> Quality:
    """Compare the logits of held-out documents with their labels."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    return Quality(float(balanced_accuracy_score(labels, logits > 0)), float(roc_auc_score(labels, logits)),
                   int(labels.sum()), int((1 - labels).sum()))
