"""From scores to proxies: the best-scoring public documents that are no copies of the owner's, up to a token budget.

Only candidates are read again, tokenized and compared with the owner's documents, round by round until the budget is
used; their texts wait on disk. Memory: about 40 bytes for each public document.

Legend: n public documents.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from flexolmo_megatron.domain.proxy_state import ProxyState, Scores
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file, read_json, write_json
from flexolmo_megatron.shards.run import Where, progress_folder, run_shards

_MARGIN = 1.2
"""Candidates read beyond the expected need, because some will be copies: cheaper than another round."""
_BYTES_PER_TOKEN = 4.0
"""First guess, until a round has measured it."""
_ROUND_BYTES = 1 << 30
"""Text of the candidates of one round, at most."""


class _Candidate(NamedTuple):
    round: int
    shard: int
    """It is in this file of the round."""
    place: int
    length: int
    tokens: int
    copy: int
    """1 for a copy, 2 for a near-copy."""


@dataclass
class Selection:
    """What was selected and what was not."""

    documents: np.ndarray
    """Numbers of the proxies among all public documents, best first, int64."""
    tokens: int = 0
    """Of the proxies, each with its end-of-document token."""
    text_bytes: int = 0
    copies: int = 0
    """Documents that would have been proxies but are copies of the owner's."""
    near_copies: int = 0
    """The same for near-copies."""
    exhausted: bool = False
    """Whether there were no more public documents before the budget was used."""


def select(files: Sequence[Path], scores: Sequence[Scores], state: ProxyState, *, budget: int, jaccard: float,
           tokenizer: dict[str, str], text_key: str, parts: int, where: Where, out: Path) -> Selection:
    """Select proxies and write them to ``out``, best first, as JSON lines with text, source and score.

    Args:
        files: public files.
        scores: of each.
        state: with the signatures of the owner's documents; candidates are kept there meanwhile.
        budget: largest number of tokens. The first document that does not fit ends the selection.
        jaccard: similarity from which a document is a near-copy.
        tokenizer: that counts tokens, see ``load_tokenizer``.
        text_key: key or column of a document.
        parts: shards of each file. The result does not depend on them.
        where: shards are worked on.
        out: file of the proxies.

    Raises:
        FlexOlmoError: not even the best document fits the budget, all documents are copies, or a file has changed.
    """
    reader = _CandidateReader(files, scores, state, jaccard, tokenizer, text_key, parts, where, budget)
    logits = np.concatenate([one.logits for one in scores])
    sizes = np.concatenate([one.sizes for one in scores])
    order = np.argsort(-logits, kind="stable")  # of equal scores, what comes first in the files
    result = Selection(order[:0])
    accepted: list[tuple[int, _Candidate]] = []
    ratio = 1.0 if tokenizer.get("type") == "byte" else _BYTES_PER_TOKEN
    position, full = 0, False
    while not full and position < len(order):
        wanted = min((budget - result.tokens) * ratio * _MARGIN, _ROUND_BYTES)
        cumulated = np.cumsum(sizes[order[position : position + max(1, int(wanted))]])
        end = position + int(np.searchsorted(cumulated, wanted)) + 1
        found = reader.read(np.sort(order[position:end]))
        ratio = float(sizes[order[position:end]].sum() / sum(candidate.tokens for candidate in found.values()))
        for document in order[position:end].tolist():
            candidate = found[document]
            if candidate.copy:
                result.copies += candidate.copy == 1
                result.near_copies += candidate.copy == 2
                continue
            if result.tokens + candidate.tokens > budget:
                full = True
                break
            accepted.append((document, candidate))
            result.tokens += candidate.tokens
        position = end
    if not accepted:
        raise FlexOlmoError(f"--tokens {budget:,}: expected at least {candidate.tokens:,}, the length of the best "
                            "public document" if full else
                            f"all {len(order):,} public documents are copies or near-copies of the owner's: there is "
                            "nothing to select")
    with atomic_file(out) as file, ExitStack() as opened:
        texts: dict[tuple[int, int], BinaryIO] = {}
        for document, candidate in accepted:
            shard = candidate.round, candidate.shard
            if shard not in texts:
                texts[shard] = opened.enter_context(open(reader.text_file(*shard), "rb"))
            texts[shard].seek(candidate.place)
            file.write(texts[shard].read(candidate.length))
            file.write(f', "score": {round(float(logits[document]), 4)}}}\n'.encode())
    result.documents = np.array([document for document, _ in accepted], np.int64)
    result.text_bytes = int(sizes[result.documents].sum())
    result.exhausted = not full
    return result


class _CandidateReader:
    """Reads documents, counts their tokens and compares them with the owner's: one round after the other."""

    def __init__(self, files: Sequence[Path], scores: Sequence[Scores], state: ProxyState, jaccard: float,
                 tokenizer: dict[str, str], text_key: str, parts: int, where: Where, budget: int) -> None:
        self._files, self._scores, self._owner, self._jaccard = files, scores, state.array_file("owner"), jaccard
        self._tokenizer, self._text_key, self._parts, self._where = tokenizer, text_key, parts, where
        self._starts = np.cumsum([0, *(len(one.lines) for one in scores)])
        self._rounds = 0
        self._folder = state.folder / "candidates"
        plan = {"budget": budget, "jaccard": jaccard, "tokenizer": tokenizer}
        kept = self._folder / "plan.json"
        if kept.exists() and read_json(kept, "the plan of a selection") != plan:
            shutil.rmtree(self._folder)  # of an earlier start with another budget, say
        self._folder.mkdir(exist_ok=True)
        write_json(kept, plan)

    def _round_folder(self, number: int) -> Path:
        return self._folder / f"round_{number:04d}"

    def text_file(self, number: int, shard: int) -> Path:
        """Where a shard of a round has its texts."""
        return self._round_folder(number) / f"{shard:06d}.jsonl"

    def read(self, documents: np.ndarray) -> dict[int, _Candidate]:
        """What is found out about the documents with these numbers, ascending."""
        from flexolmo_megatron.domain.proxy_steps import CountTokens, MarkCopies, SaveCandidates
        from flexolmo_megatron.shards.documents import ReadDocuments

        number, self._rounds = self._rounds, self._rounds + 1
        folder = self._round_folder(number)
        folder.mkdir(exist_ok=True)
        bounds = np.searchsorted(documents, self._starts)
        chosen = [(file, documents[bounds[file] : bounds[file + 1]]) for file in range(len(self._files))
                  if bounds[file + 1] > bounds[file]]
        lists = []
        for file, own in chosen:
            lists.append(folder / f"wanted_{file:06d}.npy")
            with atomic_file(lists[-1]) as output:
                np.save(output, self._scores[file].lines[own - self._starts[file]])
        reader = ReadDocuments([self._files[file] for file, _ in chosen], self._parts, self._text_key, 0,
                               progress_folder(folder), lists)
        steps = [reader, CountTokens(self._tokenizer), MarkCopies(self._owner, self._jaccard), SaveCandidates(folder)]
        run_shards(steps, len(chosen) * self._parts, folder, self._where, "proxy candidates")
        found = {}
        for index, (file, own) in enumerate(chosen):
            document_of = dict(zip(self._scores[file].lines[own - self._starts[file]].tolist(), own.tolist(),
                                   strict=True))
            for shard in range(index * self._parts, (index + 1) * self._parts):
                with np.load(folder / f"{shard:06d}.npz", allow_pickle=False) as kept:
                    for line, *rest in kept["rows"].tolist():
                        found[document_of[line]] = _Candidate(number, shard, *rest)
        missing = len(documents) - len(found)
        if missing:
            raise FlexOlmoError(f"{missing} documents are no longer in the public files: they have changed since they "
                                "were scored")
        return found
