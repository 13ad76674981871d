"""Proxy data: the public documents that look most like an owner's, on which a coordinator may tune the router.

A classifier learns to tell a sample of the owner's documents from public ones, scores every public document, and the
best are taken up to a token budget, without what is a copy or near-copy of any document of the owner. What is written
holds public text and counts alone. It does tell what kind of documents the owner has: that is its purpose. Whoever has
the same public corpus may guess from a high-scoring document that is missing that the owner has a copy of it.

A public document in the sample has been an example of "not the owner's", so it scores somewhat lower than if it had
not: of consequence only where the sample is most of the public corpus.

Source: arXiv 2507.07024, section 3.3.2.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from flexolmo_megatron.domain.proxy_classifier import (
    LINEAR,
    Classifier,
    LinearClassifier,
    measure,
    split_documents,
)
from flexolmo_megatron.domain.proxy_duplicates import (
    DEFAULT_JACCARD,
    PERMUTATIONS,
    SHINGLE_WORDS,
    Signatures,
    join_signatures,
)
from flexolmo_megatron.domain.proxy_selection import Selection, select
from flexolmo_megatron.domain.proxy_state import ProxyState, as_counter, counter_arrays
from flexolmo_megatron.domain.sample import reservoir_sample
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.plots import plot_scores
from flexolmo_megatron.files import atomic_directory, check_free, write_json
from flexolmo_megatron.shards import require_datatrove
from flexolmo_megatron.shards.run import Where, kept_if_begun, progress_folder, run_shards
from flexolmo_megatron.training.documents import (
    DEFAULT_MAX_BAD,
    Bad,
    BadDocuments,
    check_apart,
    find_files,
    parse_record,
    read_records,
)
from flexolmo_megatron.training.progress import with_progress
from flexolmo_megatron.training.tokenizer import load_tokenizer

DEFAULT_DOCUMENTS = 50_000
"""Of each side to train on. The paper takes 250,000; the linear classifier needs about 20 kB of memory for each."""
FORMAT_VERSION = 1
PROXIES, REPORT, HISTOGRAM = "proxies.jsonl", "report.json", "scores.png"
_EDGES = np.arange(-15.0, 15.5, 0.5)


@dataclass(frozen=True)
class ProxyOptions:
    """How proxies are chosen."""

    tokens: int
    """Budget: the proxies have at most this many tokens."""
    tokenizer: dict[str, str]
    """That counts them."""
    classifier: str = LINEAR
    """``linear``, or the name or folder of a transformers model."""
    documents: int = DEFAULT_DOCUMENTS
    """Documents of each side that are sampled for the classifier; all where there are fewer."""
    seed: int = 0
    jaccard: float = DEFAULT_JACCARD
    """Similarity from which a public document is a near-copy of one of the owner's."""
    where: Where = Where()
    """Documents are worked on; it does not change the result."""
    text_key: str = "text"
    max_bad: int = DEFAULT_MAX_BAD
    """Unusable documents on either side that are skipped before the run stops."""
    learning_rate: float = 3e-6
    """The paper's, for arctic-embed-xs. This and the following are for a transformers model alone."""
    epochs: int = 1
    batch_size: int = 32
    """Documents of a training step, and of a batch that is scored."""
    max_tokens: int = 512
    """Of a document that the model reads."""

    def check(self) -> None:
        """Raise FlexOlmoError if a value is out of range."""
        for key, smallest in (("tokens", 1), ("documents", 1), ("seed", 0), ("max_bad", 0), ("epochs", 1),
                              ("batch_size", 1), ("max_tokens", 1)):
            if getattr(self, key) < smallest:
                raise FlexOlmoError(f"--{key.replace('_', '-')} {getattr(self, key)}: expected a number of at least "
                                    f"{smallest}")
        if not 0 < self.learning_rate < np.inf:
            raise FlexOlmoError(f"--lr {self.learning_rate}: expected a number above 0")
        if not 0 < self.jaccard <= 1:
            raise FlexOlmoError(f"--jaccard {self.jaccard}: expected a number above 0, at most 1")


@dataclass
class ProxyResult:
    """What a run did, beyond its report."""

    report: dict[str, Any]
    scored: int
    """Documents scored by this start, the rest by earlier ones."""
    seconds: float
    """That scoring them took."""
    where: Where
    """They were scored."""


def select_proxies(owner: Sequence[str], public: Sequence[str], out: str | os.PathLike,
                   options: ProxyOptions) -> ProxyResult:
    """Write the folder ``out`` with proxies.jsonl, report.json and scores.png.

    A run that was stopped goes on where it was, if it is started with the same arguments: ``OUT.state`` holds which
    shards of the public files are scored, and goes when ``out`` is complete.

    Args:
        owner: JSONL and Parquet files, and patterns of such, with the owner's documents.
        public: the same for public ones.
        out: new folder, created whole or not at all.
        options: see there.

    Raises:
        FlexOlmoError: bad input or options, a classifier that cannot be loaded, or nothing to select.
    """
    options.check()
    require_datatrove("flexolmo proxy")
    out = Path(out)
    check_free(out)
    load_tokenizer(options.tokenizer)
    owner_files, public_files = find_files(owner), find_files(public)
    check_apart(owner_files, public_files)
    state = ProxyState(out, _plan(options), {"owner files": owner_files, "public files": public_files})
    with kept_if_begun(state.folder):
        quality = state.quality()
        if quality is None and options.classifier != LINEAR:
            from flexolmo_megatron.domain.proxy_encoder import EncoderClassifier

            EncoderClassifier.open(options.classifier, {"max_tokens": options.max_tokens})  # or refused before the work
        known, owner_skipped = _owner_signatures(state, owner_files, options)
        if quality is None:
            quality = _train(state, owner_files, public_files, options)
    parts = state.parts(max(1, math.ceil(options.where.at_once / len(public_files))))
    scored, seconds, where = _score(state, public_files, parts, options)
    scores = state.scores(len(public_files), parts)
    skipped = {"owner": owner_skipped, "public": sum((one.bad for one in scores), Counter())}
    BadDocuments(options.max_bad, skipped["public"]).check()  # each shard alone may have had few enough
    with atomic_directory(out) as folder:
        selection = select(public_files, scores, state, budget=options.tokens, jaccard=options.jaccard,
                           tokenizer=options.tokenizer, text_key=options.text_key, parts=parts, where=options.where,
                           out=folder / PROXIES)
        logits = np.concatenate([one.logits for one in scores])
        report = _report(options, known, logits, selection, quality, skipped)
        write_json(folder / REPORT, report)
        plot_scores(report["histogram"], folder / HISTOGRAM)
    state.remove()
    return ProxyResult(report, scored, seconds, where)


def _plan(options: ProxyOptions) -> dict[str, Any]:
    keys = ["classifier", "documents", "seed", "text_key"]
    if options.classifier != LINEAR:
        keys += ["learning_rate", "epochs", "batch_size", "max_tokens"]
    return {"version": FORMAT_VERSION, **{key: getattr(options, key) for key in keys}}


def _owner_signatures(state: ProxyState, files: list[Path], options: ProxyOptions) -> tuple[int, Counter[str]]:
    """Keep signatures of all the owner's documents; their number, and how many are unusable, by kind."""
    from flexolmo_megatron.domain.proxy_steps import SaveSignatures
    from flexolmo_megatron.shards.documents import ReadDocuments

    kept = state.arrays("owner")
    if kept is None:
        folder = state.folder / "owner"
        reader = ReadDocuments(files, 1, options.text_key, options.max_bad, progress_folder(folder))
        run_shards([reader, SaveSignatures(state, reader)], len(files), folder, options.where, "proxy owner")
        shards = [state.arrays(f"owner_{shard:06d}") for shard in range(len(files))]
        found = join_signatures(Signatures(shard["exact"], shard["minhash"]) for shard in shards)
        bad = sum((as_counter(shard) for shard in shards), Counter())
        if not len(found.exact):
            rmtree(folder)  # as if it had not been begun
            raise FlexOlmoError("the owner's files have no usable document"
                                + f" ({BadDocuments(options.max_bad, bad).report()})" * bool(bad)
                                + f": expected text under --text-key {options.text_key}")
        state.save_arrays("owner", **found._asdict(), **counter_arrays(bad))
        kept = state.arrays("owner")
    bad = as_counter(kept)
    BadDocuments(options.max_bad, bad).check()
    return len(kept["exact"]), bad


def _sample(files: list[Path], options: ProxyOptions) -> list[str]:
    """A uniform sample of documents. Those that are unusable are left out here, and counted elsewhere."""

    def records() -> Iterator[tuple[Path, int, bytes | None]]:
        for path in files:
            for line, raw in read_records(path, options.text_key):
                yield path, line, raw

    # Records instead of texts, because parsing is most of the cost of reading a corpus.
    shown = with_progress(records(), lambda record: len(record[2] or b""))
    chosen = reservoir_sample(shown, options.documents, options.seed)
    parsed = (parse_record(path, line, raw, options.text_key) for path, line, raw in chosen)
    return [text for text in parsed if not isinstance(text, Bad)]


def _train(state: ProxyState, owner_files: list[Path], public_files: list[Path],
           options: ProxyOptions) -> dict[str, Any]:
    """Train and keep the classifier; returns how good it is, and the held-out logits of the owner's documents."""
    split = split_documents(_sample(owner_files, options), _sample(public_files, options), options.seed)
    classifier: Classifier
    if options.classifier == LINEAR:
        classifier = LinearClassifier.train(split.train, split.train_labels, options.seed)
    else:
        from flexolmo_megatron.domain.proxy_encoder import EncoderClassifier

        classifier = EncoderClassifier.train(
            options.classifier, split.train, split.train_labels, seed=options.seed, epochs=options.epochs,
            learning_rate=options.learning_rate, batch_size=options.batch_size, max_tokens=options.max_tokens)
    logits = classifier.logits(split.held_out)
    owner_trained = int(split.train_labels.sum())
    quality = {
        "classifier": classifier.describe(),
        "trained_on": {"owner": owner_trained, "public": len(split.train) - owner_trained},
        "held_out": asdict(measure(logits, split.held_out_labels)),
        "held_out_owner_histogram": _histogram(logits[split.held_out_labels == 1]),
    }
    classifier.save(state.classifier_folder())
    state.save_quality(quality)
    return quality


def _score(state: ProxyState, files: list[Path], parts: int, options: ProxyOptions) -> tuple[int, float, Where]:
    """Score the parts of public files that are not yet; returns documents, seconds and where."""
    from flexolmo_megatron.domain.proxy_steps import SaveScores, Score
    from flexolmo_megatron.shards.documents import ReadDocuments

    # A neural classifier uses the accelerator, or all processors, by itself.
    where = replace(options.where, workers=options.where.workers if options.classifier == LINEAR else 1)
    todo = [shard for shard in range(len(files) * parts) if not state.is_scored(shard)]
    folder = state.folder / "scoring"
    reader = ReadDocuments(files, parts, options.text_key, options.max_bad, progress_folder(folder))
    start = time.monotonic()
    run_shards([reader, Score(options.classifier, state.classifier_folder()), SaveScores(state, reader)],
               len(files) * parts, folder, where, "proxy scoring")
    seconds = time.monotonic() - start
    return sum(len(state.shard_scores(shard).lines) for shard in todo), seconds, where


def _histogram(logits: np.ndarray) -> list[int]:
    return np.histogram(np.clip(logits, _EDGES[0], _EDGES[-1]), _EDGES)[0].tolist()


def _report(options: ProxyOptions, owner_documents: int, logits: np.ndarray, selection: Selection,
            quality: dict[str, Any], skipped: dict[str, Counter[str]]) -> dict[str, Any]:
    """Counts alone: of the owner's documents, neither text nor names of files; of folders only the last part."""
    from flexolmo_megatron.domain.embed import display_name

    chosen = logits[selection.documents]
    tokenizer = {key: display_name(value) if key == "path" else value for key, value in options.tokenizer.items()}
    return {
        "format_version": FORMAT_VERSION,
        "seed": options.seed,
        "classifier": quality["classifier"],
        "trained_on": quality["trained_on"],
        "held_out": quality["held_out"],
        "owner_documents": owner_documents,
        "public_documents": len(logits),
        "skipped": {side: dict(sorted(bad.items())) for side, bad in skipped.items()},
        "duplicates": {
            "jaccard": options.jaccard, "shingle_words": SHINGLE_WORDS, "permutations": PERMUTATIONS,
            "copies_excluded": selection.copies, "near_copies_excluded": selection.near_copies,
        },
        "proxies": {
            "documents": len(selection.documents), "tokens": selection.tokens, "text_bytes": selection.text_bytes,
            "token_budget": options.tokens, "tokenizer": tokenizer, "exhausted": selection.exhausted,
            "highest_score": round(float(chosen.max()), 4), "lowest_score": round(float(chosen.min()), 4),
            "median_score": round(float(np.median(chosen)), 4),
        },
        "histogram": {
            "edges": _EDGES.tolist(), "public": _histogram(logits), "proxies": _histogram(chosen),
            "owner_held_out": quality["held_out_owner_histogram"],
        },
    }
