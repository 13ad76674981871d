"""Several models, each with all or some of its experts, on several domains."""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from flexolmo_megatron.convert.rows import Choice
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.candidates import Candidate, check_candidates
from flexolmo_megatron.evaluation.perplexity import DEFAULT_BATCH_TOKENS, DomainScore, evaluate_documents
from flexolmo_megatron.evaluation.results import Results, check_reference
from flexolmo_megatron.evaluation.routing import RoutingRecorder, RoutingShare
from flexolmo_megatron.inference.model import Model, free_memory, load_model
from flexolmo_megatron.training.documents import DEFAULT_MAX_BAD, BadDocuments, find_files, stream_documents


@dataclass
class Options:
    """How to evaluate."""

    max_bytes: int | None = None
    """UTF-8 bytes of each domain, from its first document on; None for all."""
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    """Tokens, with padding, that a model computes at a time; at least one sequence."""
    text_key: str = "text"
    """Key of the JSON objects, or Parquet column, that holds the text."""
    max_bad: int = DEFAULT_MAX_BAD
    """Unusable documents per domain that are skipped before the run stops."""
    routing: bool = False
    """Also record which experts are chosen."""
    dtype: str = "float32"
    """What to compute in: float32 or bfloat16."""
    anchor: str | os.PathLike | None = None
    """Where the anchor of pairs is now; None for where it was when each was trained."""
    rows: Choice = "strict"
    """Router rows of models with a tuned router; see ``load_model``."""

    def __post_init__(self) -> None:
        for name, smallest in (("max_bytes", 1), ("batch_tokens", 1), ("max_bad", 0)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise FlexOlmoError(f"--{name.replace('_', '-')} {value}: expected at least {smallest}")


def check_inputs(candidates: Sequence[Candidate], domains: Mapping[str, Sequence[str]], reference: str | None) -> None:
    """Find, before any model is loaded, what would stop the evaluation half-way; reads no weights.

    Raises:
        FlexOlmoError: no model or domain, a name that comes twice, a missing checkpoint or file, an unknown expert
            or reference.
    """
    if not candidates or not domains:
        raise FlexOlmoError("nothing to evaluate: expected at least one --model and one --domain")
    if reference is not None:
        check_reference(reference, [candidate.name for candidate in candidates])
    for files in domains.values():
        find_files(files)
    check_candidates(candidates)


def _evaluate(model: Model, candidate: Candidate, domain: str, files: Sequence[str],
              options: Options) -> tuple[DomainScore, RoutingShare | None]:
    bad = BadDocuments(options.max_bad)
    texts = (document.text for document in stream_documents(files, options.text_key, bad))
    title = f"{candidate.name} on {domain}"
    recorder = RoutingRecorder(model.module, model.expert_names) if options.routing else None
    bar = tqdm(desc=title, unit=" tokens", unit_scale=True, leave=False, disable=None)
    with bar, recorder or contextlib.nullcontext():
        try:
            score = evaluate_documents(
                model, texts, experts=candidate.experts(model.expert_names), max_bytes=options.max_bytes,
                batch_tokens=options.batch_tokens, recorder=recorder, progress=bar.update)
        except FlexOlmoError as error:
            raise FlexOlmoError(f"{title}: {error}") from error
    skipped = f"; skipped {bad.report()}" if bad.counts else ""
    print(f"{title}: {score.bits_per_byte:.4f} bits per byte, {score.documents:,} documents, {score.text_bytes:,} bytes"
          f"{skipped}", file=sys.stderr, flush=True)
    return score, recorder.share() if recorder else None


def compare(candidates: Sequence[Candidate], domains: Mapping[str, Sequence[str]], options: Options | None = None,
            reference: str | None = None) -> Results:
    """Evaluate every candidate on every domain; reports each score on standard error as it comes.

    A checkpoint is loaded once for all candidates that share it, and only one is in memory at a time.

    Args:
        candidates: the rows of the table.
        domains: by name, the files and patterns that hold the domain's documents.
        options: how to evaluate.
        reference: name of the candidate that the others are compared with.

    Raises:
        FlexOlmoError: see ``check_inputs``, ``load_model``, ``stream_documents`` and ``evaluate_documents``.
    """
    options = options or Options()
    check_inputs(candidates, domains, reference)
    scores: dict[str, dict[str, DomainScore]] = {candidate.name: {} for candidate in candidates}
    routing: dict[str, dict[str, RoutingShare]] = {}
    models: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(candidate.path for candidate in candidates):
        model = load_model(path, getattr(torch, options.dtype), anchor=options.anchor, rows=options.rows)
        for candidate in candidates:
            if candidate.path != path:
                continue
            experts = candidate.experts(model.expert_names)
            models[candidate.name] = {"path": str(path), "experts": experts or list(model.expert_names)}
            if rows := model.rows_used(experts):
                models[candidate.name]["rows"] = rows
                print(f"{candidate.name}: router rows {rows}", file=sys.stderr, flush=True)
            for domain, files in domains.items():
                score, share = _evaluate(model, candidate, domain, files, options)
                scores[candidate.name][domain] = score
                if share:
                    routing.setdefault(candidate.name, {})[domain] = share
        del model
        free_memory()
    setup = {"models": models, "domains": {domain: list(files) for domain, files in domains.items()},
             "max_bytes": options.max_bytes, "dtype": options.dtype}
    return Results(scores, reference, {name: routing[name] for name in scores if name in routing}, setup)
