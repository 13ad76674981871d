"""What a method of the comparison is: a definition, the models and training it needs, and how it predicts texts.

A method turns texts into the log-probability of each of their tokens. Whatever can be had from log-probabilities of
single models comes from a ``Store``, which computes each of them once for all methods.

Legend: n models or owners, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flexolmo_megatron.convert.rows import Choice
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.perplexity import DomainScore, LogProbs, score_log_probs
from flexolmo_megatron.evaluation.texts import TextSet

if TYPE_CHECKING:
    from flexolmo_megatron.evaluation.methods.store import Store

RUNS = ("public", "owner", "router", "btx", "unrestricted-1x", "unrestricted-2x")
"""Kinds of training runs: the anchor's; one owner's, dense or beside the anchor; router tuning of the merged model;
BTX's training after its merge; the mixtures that are trained on everything."""


@dataclass(frozen=True)
class Models:
    """Where the models of one comparison are: checkpoints, training runs or Hugging Face directories."""

    public: Path
    """The anchor, published or dense."""
    dense: Mapping[str, Path] = field(default_factory=dict)
    """By owner: a dense copy of the anchor, trained on the owner's data."""
    soup: Path | None = None
    """The average of the public and all dense models, from ``soup.write_soup``."""
    btx: Path | None = None
    """``btx.write_btx``'s model after its training on public data."""
    merged: Path | None = None
    """FlexOlmo before router tuning."""
    tuned: Path | None = None
    """FlexOlmo after router tuning; keeps its untuned rows."""
    unrestricted: Mapping[str, Path] = field(default_factory=dict)
    """By "1x" and "2x", the training FLOPs relative to those of FlexOlmo's owners: mixtures trained on everything."""
    ablations: Mapping[str, Path] = field(default_factory=dict)
    """By name, for example "no bias": merged models whose owners trained in another way."""


@dataclass(frozen=True)
class Settings:
    """What the methods can be tuned by; the table says what was used."""

    btm_temperatures: Sequence[float] = (1.0,)
    """tau of softmax(-NLL / tau), NLL being the total over the text in nats: 1 is Bayes' rule with a flat prior."""
    btm_top_k: Sequence[int] = (2,)
    """Models that BTM mixes; a mixture of all of them comes on top."""
    soup_temperature: float = 0.1
    """tau of the weighted soup, whose NLL is per token, in nats."""
    prompt_bytes: int = 128
    """UTF-8 bytes that a classifier sees to pick a model."""
    classifier_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Training documents of "public" and of every owner, for the classifier; without any there is none."""
    seed: int = 0
    """Of the classifier's training."""

    def __post_init__(self) -> None:
        values = {"btm_temperatures": self.btm_temperatures, "btm_top_k": self.btm_top_k,
                  "soup_temperature": [self.soup_temperature], "prompt_bytes": [self.prompt_bytes]}
        for name, numbers in values.items():
            whole = name in ("btm_top_k", "prompt_bytes")
            for number in numbers:
                if not (number >= 1 if whole else 0 < number < math.inf):
                    raise FlexOlmoError(f"{name} = {number}: expected {'at least 1' if whole else 'a number above 0'}")


@dataclass(frozen=True)
class Variant:
    """A model as it is asked: with all or some experts, another top-k, other router rows."""

    path: Path
    without: tuple[str, ...] = ()
    """Experts to leave out."""
    top_k: int | None = None
    """Active experts; None for the model's own number."""
    rows: Choice = "strict"
    """Router rows of a model with a tuned router, see ``load_model``."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    """What the table calls it; unique."""
    family: str
    """The key of ``registry.FAMILIES`` that it comes from."""
    definition: str
    """One line."""
    source: str
    """Where it is from."""
    sees: Literal["causal", "oracle"]
    """causal: predicts each token from those before it alone. oracle: has seen more of the text."""
    inference: str
    """What a token costs, in forward passes of models."""
    runs: Mapping[str, int]
    """How many training runs of each kind of ``RUNS`` its models took."""
    variants: tuple[Variant, ...]
    """The models whose log-probabilities it asks the store for."""
    log_probs: Callable[["Store", TextSet], LogProbs]
    """Log-probabilities of every token of every text."""

    def training_tokens(self, tokens: Mapping[str, int]) -> int:
        """Return the training tokens behind the method.

        Args:
            tokens: of one training run of each kind.

        Raises:
            FlexOlmoError: a kind that the method needs is missing.
        """
        for kind in self.runs:
            if kind not in tokens:
                raise FlexOlmoError(f"method {self.name!r} needs a {kind} run, whose number of tokens is not given")
        return sum(count * tokens[kind] for kind, count in self.runs.items())

    @property
    def training(self) -> str:
        """The formula of ``training_tokens``: "public + 3 owner + router"."""
        return " + ".join(kind if count == 1 else f"{count} {kind}" for kind, count in self.runs.items())

    def evaluate(self, store: "Store", texts: TextSet) -> DomainScore:
        """Return the bits per byte, on whatever texts."""
        return score_log_probs(texts.texts, self.log_probs(store, texts))


def single(name: str, family: str, variant: Variant, definition: str, source: str, runs: Mapping[str, int]) -> Method:
    """Return the method that is just one model."""
    return Method(name, family, definition, source, "causal", "1 forward pass", runs, (variant,),
                  lambda store, texts: store.log_probs(variant, texts))
