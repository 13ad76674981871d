"""All methods on all held-out texts, of one seed: ``scores.json``, and the log-probabilities that it was made from."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_megatron.compare.table import MERGED
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.domain.sample import reservoir_sample
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods import Method, Models, Settings, Store, TextSet, Variant, build_methods
from flexolmo_megatron.evaluation.methods.base import single
from flexolmo_megatron.evaluation.mixed import mixed_text_set
from flexolmo_megatron.evaluation.perplexity import limit_bytes
from flexolmo_megatron.files import write_json
from flexolmo_megatron.training.documents import DEFAULT_MAX_BAD, BadDocuments, stream_documents

if TYPE_CHECKING:
    from flexolmo_megatron.compare.config import CompareConfig
    from flexolmo_megatron.compare.plan import Comparison

SCORES = "scores.json"
MIXED = "mixed"
"""Name of the texts of several domains."""


def held_out(config: "CompareConfig", report: Callable[[str], None] = lambda line: None) -> list[TextSet]:
    """Return the held-out texts of each domain, and the mixed ones where they are wanted.

    Args:
        config: all.
        report: takes a line on each domain of which documents are skipped.

    Raises:
        FlexOlmoError: a file cannot be read, it has too many unusable documents or none that is usable, or they are too
            short to be mixed.
    """
    sets, max_bytes = [], config.evaluation.max_bytes
    for domain, texts in config.domains.items():
        bad = BadDocuments(sys.maxsize)  # an error is to name the option, which is not --max-bad
        documents = (document.text for document in stream_documents(texts.valid, config.text_key, bad))
        found = tuple(limit_bytes(documents, max_bytes))
        if not found or bad.counts.total() > DEFAULT_MAX_BAD:
            raise FlexOlmoError(f"{domain}: {', '.join(texts.valid)}: {bad.report() if bad.counts else 'no document'}; "
                                f"expected text at text_key = {config.text_key!r} and at most {DEFAULT_MAX_BAD} "
                                "unusable documents")
        if bad.counts:
            report(f"held-out text of {domain}: skipped {bad.report()}")
        sets.append(TextSet(domain, found))
    if config.evaluation.mixed:
        try:
            sets.append(mixed_text_set(MIXED, {texts.name: texts.texts for texts in sets}, max_bytes=max_bytes))
        except FlexOlmoError as error:
            cut = f" (texts are cut at evaluation.max_bytes = {max_bytes})" * (max_bytes is not None)
            raise FlexOlmoError(f"{error}{cut}, or evaluation.mixed=false") from None
    return sets


def _settings(config: "CompareConfig", wanted: bool, seed: int) -> Settings:
    evaluation = config.evaluation
    documents = {domain: reservoir_sample((document.text for document in
                                           stream_documents(texts.train, config.text_key)),
                                          evaluation.classifier_documents, seed)
                 for domain, texts in config.domains.items()} if wanted else {}
    return Settings(evaluation.btm_temperatures, evaluation.btm_top_k, evaluation.soup_temperature,
                    evaluation.prompt_bytes, documents, seed)


def pairs(models: Models) -> list[Method]:
    """The anchor with one owner's expert, as the owner trained it: the merged model without all other experts."""
    if models.merged is None:
        return []
    owners = open_model(models.merged).card.expert_names[1:]
    return [single(f"pair {owner}", "flexolmo",
                   Variant(models.merged, tuple(other for other in owners if other != owner), 2),
                   f"the anchor and the expert of {owner}, both active", "arXiv 2507.07024, section 3",
                   {"public": 1, "owner": 1}) for owner in owners]


def group(method: Method) -> str:
    """Which of the report's tables a method belongs to."""
    if method.family == "ablations":
        return "ablations"
    if method.name.startswith("pair ") or method.family != "flexolmo" or method.name in MERGED:
        return "methods"
    return "opt-outs" if any(variant.without for variant in method.variants) else "active experts"


def score(comparison: "Comparison", seed: int, folder: Path) -> None:
    """Evaluate every method and write ``scores.json``; log-probabilities that are there are not computed again."""
    config, models = comparison.config, comparison.models[seed]
    chosen = comparison.families
    sets = held_out(config)
    settings = _settings(config, "prompt routing" in chosen, seed)
    methods = build_methods(models, settings, chosen)
    first = next((number for number, method in enumerate(methods) if method.family == "flexolmo"), len(methods))
    methods[first:first] = pairs(models)
    store = Store(folder / "log_probs", batch_tokens=config.evaluation.batch_tokens)
    for number, method in enumerate(methods, 1):  # method by method, for a line on each
        print(f"  {number}/{len(methods)} {method.name}", flush=True)
        store.fill([method], sets)
    rows, routing = [], {}
    for method in methods:
        scores = {texts.name: method.evaluate(store, texts) for texts in sets}
        print(f"{method.name}: " + "  ".join(f"{name} {value.bits_per_byte:.3f}" for name, value in scores.items()),
              flush=True)
        rows.append(_row(comparison, method, {name: {**asdict(value), "bits_per_byte": value.bits_per_byte}
                                              for name, value in scores.items()}))
        if method.name in MERGED:  # their routing shares are kept
            routing[method.name] = {texts.name: asdict(store.routing(method.variants[0], texts)) for texts in sets}
    store.models([])
    write_json(folder / SCORES, {"seed": seed, "methods": rows, "routing": routing})


def _row(comparison: "Comparison", method: Method, scores: Mapping[str, Any]) -> dict[str, Any]:
    about = {key: getattr(method, key) for key in ("name", "family", "definition", "source", "sees", "inference",
                                                   "training")}
    tokens, flops = comparison.budget_of(method)
    return {**about, "group": group(method), "training_tokens": tokens, "training_flops": flops,
            "scores": dict(scores)}
