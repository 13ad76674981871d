"""From scores to proxies: the best-scoring public documents that are no copies of the owner's, up to a token budget.

Only candidates are read again, tokenized and compared with the owner's documents, round by round until the budget is
used; their texts wait on disk. Memory: about 40 bytes for each public document.

Legend: n public documents.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from flexolmo_megatron.domain.proxy_duplicates import DuplicateIndex, Signatures, signatures
from flexolmo_megatron.domain.proxy_state import Scores
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file
from flexolmo_megatron.training.document_pool import Chunk, Records, read_chunks, work
from flexolmo_megatron.training.tokenizer import load_tokenizer

_MARGIN = 1.2
"""Candidates read beyond the expected need, because some will be copies: cheaper than another round."""
_BYTES_PER_TOKEN = 4.0
"""First guess, until a round has measured it."""
_ROUND_BYTES = 1 << 30
"""Text of the candidates of one round, at most."""


class _Candidates(NamedTuple):
    lines: list[int]
    texts: list[str]
    tokens: list[int]
    signatures: Signatures


def _make_preparer(argument: tuple[dict[str, str], str]) -> Callable[[Chunk], _Candidates]:
    spec, text_key = argument
    tokenizer = load_tokenizer(spec)

    def prepare(chunk: Chunk) -> _Candidates:
        lines, texts, _ = chunk.parse(text_key)
        return _Candidates(lines, texts, [len(tokenizer.encode(text)) + 1 for text in texts], signatures(texts))

    return prepare


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


def select(files: Sequence[Path], scores: Sequence[Scores], index: DuplicateIndex, *, budget: int,
           tokenizer: dict[str, str], text_key: str, workers: int, spool: Path, out: Path) -> Selection:
    """Select proxies and write them to ``out``, best first, as JSON lines with text, score and source.

    Args:
        files: public files.
        scores: of each.
        index: of the owner's documents.
        budget: largest number of tokens. The first document that does not fit ends the selection.
        tokenizer: that counts tokens, see ``load_tokenizer``.
        text_key: key or column of a document.
        workers: processes; the result does not depend on it.
        spool: file for candidates, overwritten.
        out: file of the proxies.

    Raises:
        FlexOlmoError: not even the best document fits the budget, or all documents are copies.
    """
    logits = np.concatenate([one.logits for one in scores])
    sizes = np.concatenate([one.sizes for one in scores])
    starts = np.cumsum([0, *(len(one.lines) for one in scores)])
    order = np.argsort(-logits, kind="stable")  # of equal scores, what comes first in the files
    result = Selection(order[:0])
    accepted: list[tuple[int, int, int]] = []  # document, where its line is in the spool, length of the line
    ratio = 1.0 if tokenizer.get("type") == "byte" else _BYTES_PER_TOKEN
    position, full = 0, False
    try:
        with open(spool, "wb+") as texts:
            while not full and position < len(order):
                wanted = min((budget - result.tokens) * ratio * _MARGIN, _ROUND_BYTES)
                cumulated = np.cumsum(sizes[order[position : position + max(1, int(wanted))]])
                end = position + int(np.searchsorted(cumulated, wanted)) + 1
                found = _read_candidates(files, scores, starts, logits, np.sort(order[position:end]), index, texts,
                                         (tokenizer, text_key), workers)
                counted = sum(tokens for _, _, tokens, _ in found.values())
                ratio = float(sizes[order[position:end]].sum() / counted)
                for document in order[position:end].tolist():
                    place, length, tokens, kind = found[document]
                    if kind:
                        result.copies += kind == 1
                        result.near_copies += kind == 2
                        continue
                    if result.tokens + tokens > budget:
                        full = True
                        break
                    accepted.append((document, place, length))
                    result.tokens += tokens
                position = end
            if not accepted:
                raise FlexOlmoError(f"--tokens {budget:,}: expected at least {tokens:,}, the length of the best public "
                                    "document" if full else
                                    f"all {len(order):,} public documents are copies or near-copies of the owner's: "
                                    "there is nothing to select")
            with atomic_file(out) as file:
                for _, place, length in accepted:
                    texts.seek(place)
                    file.write(texts.read(length))
    except OSError as error:
        raise FlexOlmoError(f"cannot write {spool}: {error.strerror}") from error
    finally:
        spool.unlink(missing_ok=True)
    result.documents = np.array([document for document, _, _ in accepted], np.int64)
    result.text_bytes = int(sizes[result.documents].sum())
    result.exhausted = not full
    return result


def _read_candidates(files: Sequence[Path], scores: Sequence[Scores], starts: np.ndarray, logits: np.ndarray,
                     documents: np.ndarray, index: DuplicateIndex, texts: BinaryIO,
                     argument: tuple[dict[str, str], str], workers: int) -> dict[int, tuple[int, int, int, int]]:
    """Spool the documents with these numbers; where each is, its length, its tokens, and 1 if a copy, 2 if near."""
    wanted: dict[int, dict[int, int]] = {}
    for file in range(len(files)):
        first, last = np.searchsorted(documents, (starts[file], starts[file + 1]))
        if last > first:
            own = documents[first:last]
            wanted[file] = dict(zip(scores[file].lines[own - starts[file]].tolist(), own.tolist(), strict=True))

    def choose(file: int, records: Records) -> Iterator[tuple[int, bytes | None]]:
        left = len(wanted[file])
        for line, raw in records:
            if line in wanted[file]:
                yield line, raw
                left -= 1
                if not left:
                    return

    found = {}
    chunks = read_chunks([(file, files[file]) for file in wanted], argument[1], choose)
    for chunk, candidates in work(chunks, _make_preparer, argument, workers):
        copies, near = index.find(candidates.signatures)
        kinds = np.where(copies, 1, np.where(near, 2, 0)).tolist()
        for line, text, tokens, kind in zip(candidates.lines, candidates.texts, candidates.tokens, kinds, strict=True):
            document = wanted[chunk.file][line]
            place = texts.seek(0, 2)
            record = {"text": text, "score": round(float(logits[document]), 4), "source": f"{chunk.path.name}:{line}"}
            length = texts.write(json.dumps(record, ensure_ascii=False).encode() + b"\n") if not kind else 0
            found[document] = place, length, tokens, kind
    missing = len(documents) - len(found)
    if missing:
        raise FlexOlmoError(f"{missing} documents are no longer in the public files: they have changed since they were "
                            "scored")
    return found
