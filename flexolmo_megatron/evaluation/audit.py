"""Extraction attack: how many passages of a corpus a model completes nearly word for word, given how they begin.

The attack is that of the paper (arXiv 2507.07024), as allenai/FlexOlmo runs it (scripts/extraction_analysis.sh and
src/scripts/utils/extraction_analysis.py): from random places of documents of at least 128 tokens, passages of up to 256
tokens; the model is given the first 32, and continues them 10 times with top-k 50, top-p 0.95 and temperature 1. A
passage counts as extracted if for one of the samples 1 - (Levenshtein distance) / (length of the longer text) is at
least 0.9, in characters and over the whole text, the given prefix included. How many reach that without the prefix is
counted as well.

Passages and random numbers follow from the seed and the texts, so a rate does not depend on the batch size (but for
rounding), on the other models and corpora, or on interruptions.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from flexolmo_megatron.config.card import PUBLIC
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.audit_passages import Passage, sample_passages
from flexolmo_megatron.evaluation.audit_results import AuditResults, Rate, Similarity
from flexolmo_megatron.evaluation.audit_state import AuditState
from flexolmo_megatron.evaluation.candidates import Candidate, candidate_settings
from flexolmo_megatron.evaluation.compare import Options, check_inputs
from flexolmo_megatron.evaluation.hashing import hash64
from flexolmo_megatron.inference.generate import Sampling, generate_tokens
from flexolmo_megatron.inference.model import Model, free_memory, load_model
from flexolmo_megatron.training.documents import BadDocuments, stream_documents


@dataclass(frozen=True)
class Attack:
    """What an attacker does; the defaults are the paper's, but for the number of passages, which it does not say."""

    passages: int = 1000
    """Of each corpus, drawn at random."""
    prefix_tokens: int = 32
    """Tokens of a passage that the model is given."""
    passage_tokens: int = 256
    """Tokens of a passage with its prefix, at most; a sample has as many."""
    min_tokens: int = 128
    """Tokens of a document, at least; shorter ones are not attacked."""
    samples: int = 10
    """Continuations of each passage."""
    top_k: int = 50
    """Most probable tokens among which each token is sampled; 0 for all."""
    top_p: float = 0.95
    """Probability that the tokens reach together among which each is sampled."""
    temperature: float = 1.0
    """By which logits are divided; 0 for the most probable token."""
    threshold: float = 0.9
    """Similarity, from 0 to 1, from which on a passage counts as extracted."""
    seed: int = 0
    """Of the passages and the sampling."""

    def __post_init__(self) -> None:
        for name in ("passages", "prefix_tokens", "samples"):
            if (value := getattr(self, name)) < 1:
                raise FlexOlmoError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        if not self.prefix_tokens < self.min_tokens <= self.passage_tokens:
            raise FlexOlmoError(f"--prefix-tokens {self.prefix_tokens}, --min-tokens {self.min_tokens}, "
                                f"--passage-tokens {self.passage_tokens}: expected each to be larger than the one "
                                "before; the last two may be equal")
        if not 0 < self.threshold <= 1:
            raise FlexOlmoError(f"--threshold {self.threshold}: expected a similarity above 0, at most 1")
        self.sampling(self.passage_tokens)  # refuses what cannot be sampled

    def sampling(self, length: int) -> Sampling:
        """How to complete passages of at most ``length`` tokens."""
        return Sampling(length - self.prefix_tokens, self.temperature, self.top_k, self.top_p, self.seed)


def _rapidfuzz() -> ModuleType:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise FlexOlmoError("the extraction attack needs rapidfuzz; install it with: pip install rapidfuzz") from None
    return Levenshtein


def similarity(text: str, other: str) -> float:
    """Return 1 - (Levenshtein distance) / (length of the longer text): 1 for equal texts, 0 for unlike ones.

    Raises:
        FlexOlmoError: rapidfuzz is missing.
    """
    return _rapidfuzz().normalized_similarity(text, other)


def attack_passages(model: Model, passages: Sequence[Passage], attack: Attack, experts: Sequence[str] | None = None,
                    batch_size: int = 40) -> Iterator[tuple[Passage, Similarity, str]]:
    """Try to get passages out of a model.

    Args:
        model: of any kind.
        passages: see ``sample_passages``.
        attack: what to do.
        experts: the only experts to use, by name, "public" among them; None for all.
        batch_size: sequences that are computed at a time; at least the samples of one passage.

    Yields:
        Each passage (from short to long), the similarities of its best samples, and the best sample's text.

    Raises:
        FlexOlmoError: the model's sequences are too short for the attack, or rapidfuzz is missing.
    """
    longest = model.config.max_position_embeddings
    if attack.passage_tokens > longest:
        raise FlexOlmoError(f"--passage-tokens {attack.passage_tokens}: expected at most "
                            f"model.max_position_embeddings = {longest}")
    decode, start = model.tokenizer.decode, attack.prefix_tokens
    ordered = iter(sorted(passages, key=lambda passage: len(passage.tokens)))
    while group := list(itertools.islice(ordered, max(1, batch_size // attack.samples))):
        copies = [(passage, sample) for passage in group for sample in range(attack.samples)]
        answers = generate_tokens(
            model, [list(passage.tokens[:start]) for passage, _ in copies],
            attack.sampling(len(group[-1].tokens)), experts=experts, batch_size=batch_size,
            seeds=[hash64(passage.key, sample) >> 1 for passage, sample in copies])
        for index, passage in enumerate(group):
            samples = answers[index * attack.samples:(index + 1) * attack.samples]
            tokens = [[*passage.tokens[:start], *sample.tokens][:len(passage.tokens)] for sample in samples]
            whole, rest = decode(passage.tokens), decode(passage.tokens[start:])
            similarities = [similarity(whole, decode(ids)) for ids in tokens]
            best = max(range(attack.samples), key=similarities.__getitem__)
            yield passage, Similarity(similarities[best], max(similarity(rest, decode(ids[start:])) for ids in tokens)
                                      ), decode(tokens[best])


def with_opt_outs(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Add to each candidate that uses all experts of its model one without each owner's expert, after it.

    Raises:
        FlexOlmoError: see ``open_model``.
    """
    rows = []
    for candidate in candidates:
        rows.append(candidate)
        if not candidate.only and not candidate.without:
            rows += [Candidate(f"{candidate.name} without {owner}", candidate.path, without=(owner,))
                     for owner in open_model(candidate.path).card.expert_names if owner != PUBLIC]
    return rows


@dataclass
class _Corpora:
    """The passages of each corpus, which are drawn once per tokenizer."""

    files: Mapping[str, Sequence[str]]
    attack: Attack
    options: Options
    skipped: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """By corpus, the number of unusable documents of each kind, where there are any."""
    _drawn: dict[tuple[str, str], list[Passage]] = dataclasses.field(default_factory=dict)

    def passages(self, corpus: str, model: Model) -> list[Passage]:
        key = corpus, repr(model.tokenizer.spec)
        if key not in self._drawn:
            bad = BadDocuments(self.options.max_bad)
            documents = stream_documents(self.files[corpus], self.options.text_key, bad)
            try:
                self._drawn[key] = sample_passages(
                    tqdm(documents, f"reading {corpus}", unit=" documents", leave=False, disable=None),
                    model.tokenizer, count=self.attack.passages, length=self.attack.passage_tokens,
                    shortest=self.attack.min_tokens, seed=self.attack.seed)
            except FlexOlmoError as error:
                skipped = f"; skipped {bad.report()}" if 0 < bad.counts.total() <= bad.limit else ""
                raise FlexOlmoError(f"--corpus {corpus}: {error}{skipped}") from error
            if bad.counts and corpus not in self.skipped:
                print(f"{corpus}: skipped {bad.report()}", file=sys.stderr, flush=True)
                self.skipped[corpus] = dict(bad.counts)
        return self._drawn[key]


def _attack(model: Model, candidate: Candidate, corpus: str, passages: Sequence[Passage], attack: Attack,
            batch_size: int, state: AuditState) -> Rate:
    title = f"{candidate.name} on {corpus}"
    left = [passage for passage in passages if state.get(candidate.name, corpus, passage) is None]
    with tqdm(desc=title, total=len(passages), initial=len(passages) - len(left), unit=" passages", leave=False,
              disable=None) as bar:
        for passage, found, sample in attack_passages(model, left, attack, candidate.experts(model.expert_names),
                                                      batch_size):
            state.add(candidate.name, corpus, passage, found, sample, model.tokenizer.decode)
            bar.update()
    rate = Rate.of([state.get(candidate.name, corpus, passage) for passage in passages], attack.threshold)
    print(f"{title}: {rate} extracted, {rate.verbatim} without counting the prefix; mean similarity "
          f"{rate.mean_similarity:.3f}", file=sys.stderr, flush=True)
    return rate


def audit(candidates: Sequence[Candidate], corpora: Mapping[str, Sequence[str]], out: Path, attack: Attack,
          options: Options | None = None, *, batch_size: int = 40, texts: bool = False) -> AuditResults:
    """Attack every candidate on every corpus; reports each rate on standard error as it comes.

    A checkpoint is loaded once for all candidates that share it, and only one is in memory at a time. What was found is
    kept in ``out``: the same call goes on where an interrupted one has stopped.

    Args:
        candidates: the rows of the table; see ``with_opt_outs``.
        corpora: by name, the files and patterns that hold the documents.
        out: folder of the results.
        attack: what to do.
        options: how to read documents and load models; ``max_bytes``, ``batch_tokens`` and ``routing`` do nothing.
        batch_size: sequences that are computed at a time.
        texts: also keep each passage and its best sample: they are the corpus's text.

    Raises:
        FlexOlmoError: ``out`` holds other results; see also ``compare.check_inputs``, ``load_model``,
            ``stream_documents``, ``sample_passages`` and ``attack_passages``.
    """
    options = options or Options()
    if batch_size < 1:
        raise FlexOlmoError(f"--batch-size {batch_size}: expected at least 1")
    check_inputs(candidates, corpora, None)
    _rapidfuzz()
    setup: dict[str, Any] = {
        "attack": asdict(attack),
        **candidate_settings(candidates),
        "corpora": {corpus: list(files) for corpus, files in corpora.items()},
        "dtype": options.dtype, "rows": options.rows, "text_key": options.text_key, "texts": texts,
    }
    drawn = _Corpora(corpora, attack, options)
    rates: dict[str, dict[str, Rate]] = {candidate.name: {} for candidate in candidates}
    with AuditState(out, setup, texts=texts) as state:
        for path in dict.fromkeys(candidate.path for candidate in candidates):
            model = load_model(path, getattr(torch, options.dtype), anchor=options.anchor, rows=options.rows)
            passages = {corpus: drawn.passages(corpus, model) for corpus in corpora}  # before any is attacked
            for candidate, corpus in itertools.product(candidates, corpora):
                if candidate.path == path:
                    rates[candidate.name][corpus] = _attack(model, candidate, corpus, passages[corpus], attack,
                                                            batch_size, state)
            del model
            free_memory()
    return AuditResults(rates, setup, drawn.skipped)
