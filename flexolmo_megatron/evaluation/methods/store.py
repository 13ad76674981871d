"""Log-probabilities of texts, computed once and kept in files: every method that can be made of them costs no pass.

A file is named after all that its numbers depend on (the model's files, what the model is asked, the texts), so a
comparison that was interrupted, or gets another method, goes on with what is there. One file holds the log-probability
of each token, 4 bytes, and the routing shares of a model with experts.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flexolmo_megatron.config.card import CARD_FILE, TUNED_MODEL
from flexolmo_megatron.convert.model import newest_checkpoint
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.candidates import file_stamp
from flexolmo_megatron.evaluation.methods.base import Method, Variant
from flexolmo_megatron.evaluation.perplexity import DEFAULT_BATCH_TOKENS, LogProbs, document_log_probs
from flexolmo_megatron.evaluation.routing import RoutingRecorder, RoutingShare
from flexolmo_megatron.evaluation.texts import TextSet
from flexolmo_megatron.files import atomic_file
from flexolmo_megatron.inference.access import routers_of
from flexolmo_megatron.inference.model import Model, free_memory, load_model

_FORMAT = 1


def fingerprint(path: Path) -> str:
    """Return what tells a model's files from others, without reading large ones: names, sizes and times of change.

    Raises:
        FlexOlmoError: there is no such folder.
    """
    if not path.is_dir():
        raise FlexOlmoError(f"{path} does not exist: expected a model")
    if not (path / CARD_FILE).exists():  # a run: of what it holds, the model that open_model opens
        tuned = path / TUNED_MODEL
        path = tuned if (tuned / CARD_FILE).exists() else newest_checkpoint(path) or path
    return file_stamp(path)


@contextlib.contextmanager
def asked(model: Model, variant: Variant) -> Iterator[list[str] | None]:
    """Let a model be asked as ``variant`` says; yields the experts to name to it."""
    experts = model.experts_without(*variant.without) if variant.without else None
    routers = routers_of(model.module) if variant.top_k else []
    before = [router.topk for router in routers]
    rows, model.rows = model.rows, variant.rows

    def choose(numbers: Iterable[int]) -> None:
        for router, number in zip(routers, numbers, strict=True):
            router.topk = router.config.moe_router_topk = number  # the second one is what dispatches the tokens

    choose([variant.top_k] * len(routers))
    try:
        yield experts
    finally:
        choose(before)
        model.rows = rows


class Store:
    """Log-probabilities by model and text set, and the models that are in memory."""

    def __init__(self, folder: str | os.PathLike, *, batch_tokens: int = DEFAULT_BATCH_TOKENS,
                 dtype: torch.dtype = torch.float32, load: Callable[[Path, torch.dtype], Model] = load_model) -> None:
        """Use what is in ``folder``, which is made where it is missing.

        Args:
            folder: for the files; several processes may share it.
            batch_tokens: tokens, with padding, that a model computes at a time; at least one sequence.
            dtype: what the models compute in.
            load: reads a model.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.batch_tokens = batch_tokens
        self.dtype = dtype
        self._load = load
        self._models: dict[Path, Model] = {}

    def models(self, paths: Sequence[Path]) -> list[Model]:
        """Load models, or take them from memory, which all others leave."""
        if others := [path for path in self._models if path not in paths]:
            for path in others:
                del self._models[path]
            free_memory()
        for path in paths:
            if path not in self._models:
                self._models[path] = self._load(path, self.dtype)
        return [self._models[path] for path in paths]

    def load_alone(self, path: Path) -> Model:
        """Load a model that the caller may change; all others leave memory."""
        self.models([])
        return self._load(path, self.dtype)

    def fill(self, methods: Iterable[Method], text_sets: Sequence[TextSet]) -> None:
        """Compute all log-probabilities that the methods will ask for, loading each model once, one at a time."""
        variants = dict.fromkeys(variant for method in methods for variant in method.variants)
        for path in dict.fromkeys(variant.path for variant in variants):
            for variant in variants:
                if variant.path == path:
                    for texts in text_sets:
                        self.log_probs(variant, texts)

    def log_probs(self, variant: Variant, texts: TextSet) -> LogProbs:
        """Return a model's log-probabilities of every token of every text.

        Raises:
            FlexOlmoError: see ``load_model`` and ``document_log_probs``.
        """
        return self._read(self._file("model", (variant,), texts), lambda: self._compute(variant, texts))

    def routing(self, variant: Variant, texts: TextSet) -> RoutingShare | None:
        """Return which experts the model chooses; None for a model without a router."""
        self.log_probs(variant, texts)
        with np.load(self._file("model", (variant,), texts), allow_pickle=False) as file:
            return RoutingShare(**json.loads(str(file["routing"]))) if "routing" in file else None

    def remember(self, what: str, variants: Sequence[Variant], texts: TextSet,
                 compute: Callable[[], LogProbs]) -> LogProbs:
        """Return what ``compute`` gives, from a file where it was computed before.

        Args:
            what: a method that needs passes of its own, with its settings.
            variants: the models that it uses.
            texts: what it predicts.
            compute: the work.
        """
        return self._read(self._file(what, variants, texts), lambda: (compute(), None))

    def _file(self, what: str, variants: Sequence[Variant], texts: TextSet) -> Path:
        asks = [{**asdict(replace(variant, path=Path())), "path": fingerprint(variant.path)} for variant in variants]
        key = json.dumps([_FORMAT, what, asks, texts.fingerprint, str(self.dtype)])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"

    def _read(self, path: Path, compute: Callable[[], tuple[LogProbs, RoutingShare | None]]) -> LogProbs:
        if not path.exists():
            values, share = compute()
            arrays = {"values": np.concatenate(values), "lengths": np.array([len(part) for part in values])}
            if share:
                arrays["routing"] = np.array(json.dumps(asdict(share)))
            with atomic_file(path) as file:
                np.savez(file, **arrays)
            return values
        with np.load(path, allow_pickle=False) as file:
            return np.split(file["values"], np.cumsum(file["lengths"])[:-1])

    def _compute(self, variant: Variant, texts: TextSet) -> tuple[LogProbs, RoutingShare | None]:
        model, = self.models([variant.path])
        recorder = RoutingRecorder(model.module, model.expert_names) if model.expert_names else None
        bar = tqdm(desc=f"{variant.path.name} on {texts.name}", unit=" tokens", unit_scale=True, leave=False,
                   disable=None)
        with bar, recorder or contextlib.nullcontext(), asked(model, variant) as experts:
            values = document_log_probs(model, texts.texts, experts=experts, batch_tokens=self.batch_tokens,
                                        recorder=recorder, progress=bar.update)
        return values, recorder.share() if recorder else None
