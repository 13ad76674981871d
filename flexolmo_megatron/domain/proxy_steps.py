"""What proxy selection does to documents, as steps of datatrove pipelines that call the rest of this package."""

import json
from array import array
from functools import lru_cache
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from flexolmo_megatron.domain.proxy_classifier import load_classifier
from flexolmo_megatron.domain.proxy_duplicates import DuplicateIndex, Signatures, join_signatures, signatures
from flexolmo_megatron.domain.proxy_state import ProxyState, Scores, counter_arrays
from flexolmo_megatron.files import atomic_file
from flexolmo_megatron.shards.documents import ReadDocuments, by_chunk
from flexolmo_megatron.shards.run import file_identity
from flexolmo_megatron.training.tokenizer import load_tokenizer


class SaveSignatures(PipelineStep):
    """Keeps the signatures of a shard of the owner's documents, as ``owner_SHARD``; passes nothing on."""

    type = "OWNER"
    name = "signatures"

    def __init__(self, state: ProxyState, reader: ReadDocuments) -> None:
        super().__init__()
        self.state, self.reader = state, reader

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Sign and save."""
        found = join_signatures(signatures([document.text for document in batch]) for batch in by_chunk(data))
        self.state.save_arrays(f"owner_{rank:06d}", **found._asdict(), **counter_arrays(self.reader.bad.counts))
        yield from ()


class Score(PipelineStep):
    """Adds the classifier's ``logit`` to the metadata of documents."""

    type = "SCORER"

    def __init__(self, classifier: str, folder: Path) -> None:
        super().__init__()
        self.name, self.folder = classifier, folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Score in batches."""
        classifier = load_classifier(self.name, self.folder)
        for batch in by_chunk(data):
            with self.track_time("batch"):
                logits = classifier.logits([document.text for document in batch])
            for document, logit in zip(batch, logits.tolist(), strict=True):
                document.metadata["logit"] = logit
                yield document


class SaveScores(PipelineStep):
    """Keeps the scores of a shard; passes nothing on."""

    type = "SCORER"
    name = "save"

    def __init__(self, state: ProxyState, reader: ReadDocuments) -> None:
        super().__init__()
        self.state, self.reader = state, reader

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Collect and save."""
        lines, logits, sizes = array("q"), array("f"), array("q")
        for document in data:
            lines.append(document.metadata["line"])
            logits.append(document.metadata["logit"])
            sizes.append(document.metadata["bytes"])
        self.state.save_scores(rank, Scores(np.array(lines), np.array(logits), np.array(sizes), self.reader.bad.counts))
        yield from ()


class CountTokens(PipelineStep):
    """Adds the number of ``tokens``, the one at the document's end included, to the metadata."""

    type = "TOKENIZER"
    name = "count"

    def __init__(self, tokenizer: dict[str, str]) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Count."""
        tokenizer = load_tokenizer(self.tokenizer)
        for document in data:
            document.metadata["tokens"] = len(tokenizer.encode(document.text)) + 1
            yield document


@lru_cache(maxsize=1)
def _index(owner: Path, jaccard: float, *_: int) -> DuplicateIndex:
    """Index of the signatures in a file; what tells the file's contents from others is only part of the key."""
    with np.load(owner, allow_pickle=False) as kept:
        return DuplicateIndex(Signatures(kept["exact"], kept["minhash"]), jaccard)


class MarkCopies(PipelineStep):
    """Adds ``copy`` to the metadata: 1 for a copy of a document of the owner, 2 for a near-copy, 0 for neither."""

    type = "OWNER"
    name = "copies"

    def __init__(self, owner: Path, jaccard: float) -> None:
        super().__init__()
        self.owner, self.jaccard = owner, jaccard

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Compare in batches."""
        _, *identity = file_identity(self.owner)  # another run of this process may have written the same path
        index = _index(self.owner, self.jaccard, *identity)
        for batch in by_chunk(data):
            with self.track_time("batch"):
                copies, near = index.find(signatures([document.text for document in batch]))
            for document, kind in zip(batch, np.where(copies, 1, np.where(near, 2, 0)).tolist(), strict=True):
                document.metadata["copy"] = kind
                yield document


class SaveCandidates(PipelineStep):
    """Writes the texts of a shard that are no copies, and what selection must know of all; passes nothing on.

    ``SHARD.jsonl`` gets JSON objects that want their score and their end, and ``SHARD.npz`` for each document its line,
    its place in and its bytes of the former, its tokens and ``copy``.
    """

    type = "WRITER"
    name = "candidates"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write both files."""
        rows = array("q")
        with atomic_file(self.folder / f"{rank:06d}.jsonl") as file:
            for document in data:
                known, place, length = document.metadata, file.tell(), 0
                if not known["copy"]:
                    record = {"text": document.text, "source": document.id}
                    length = file.write(json.dumps(record, ensure_ascii=False).encode()[:-1])
                rows.extend((known["line"], place, length, known["tokens"], known["copy"]))
        with atomic_file(self.folder / f"{rank:06d}.npz") as file:
            np.savez(file, rows=np.array(rows, np.int64).reshape(-1, 5))
        yield from ()
