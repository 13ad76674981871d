"""The first step of a pipeline: the usable documents of a shard.

A shard is a file, or one of several parts of it: the chunks of the file (see document_pool.py) are dealt out in turn,
so that compressed files can be divided as well. Every part reads the whole file, which costs little beside work on it.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from flexolmo_megatron.shards.values import values_of
from flexolmo_megatron.training.document_pool import Records, read_chunks
from flexolmo_megatron.training.documents import BadDocuments

_REPORT_INTERVAL = 1.0
"""Seconds between two notes of a shard on its progress."""


class ReadDocuments(PipelineStep):
    """Yields a shard's documents, with ``line`` (or row), ``bytes`` and number of its ``chunk`` as metadata."""

    type = "READER"
    name = "JSONL and Parquet"

    def __init__(self, files: Sequence[Path], parts: int, text_key: str, max_bad: int, progress: Path,
                 wanted: Sequence[Path] | None = None, keys: Sequence[str] = ()) -> None:
        """Take what to read.

        Args:
            files: shard ``rank`` is part ``rank % parts`` of file ``rank // parts``.
            parts: of each file.
            text_key: key or column of the text.
            max_bad: unusable documents of a shard that are skipped before it fails.
            progress: folder for notes on progress, see ``progress_of``.
            wanted: of each file, a .npy file with the lines to read in ascending order; by default all.
            keys: further keys of the JSON objects, or columns, that documents get as metadata, each None if missing.
        """
        super().__init__()
        self.files, self.parts, self.text_key, self.progress, self.wanted = files, parts, text_key, progress, wanted
        self.keys = keys
        self.bad = BadDocuments(max_bad)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Read shard ``rank``."""
        file, part = divmod(rank, self.parts)
        path = self.files[file]
        note = self.progress / f"{rank:06d}"
        values = values_of(path, self.keys)
        documents = text_bytes = 0
        noted = 0.0
        for number, chunk in enumerate(read_chunks([(file, path)], self.text_key, self._choose)):
            if number % self.parts != part:
                continue
            lines, texts, bad = chunk.parse(self.text_key)
            for item in bad:
                self.bad.add(item)
                self.stat_update(f"unusable {item.kind}")
            raw = dict(chunk.records) if self.keys else {}
            for line, text in zip(lines, texts, strict=True):
                size = len(text.encode())
                text_bytes += size
                metadata = {"line": line, "bytes": size, "chunk": number}
                if self.keys:
                    metadata.update(values(line, raw[line]))
                yield Document(text, f"{path.name}:{line}", metadata=metadata)
            documents += len(texts)
            if time.monotonic() - noted >= _REPORT_INTERVAL:
                noted = time.monotonic()
                note.write_text(f"{documents} {text_bytes}")
        note.write_text(f"{documents} {text_bytes}")
        self.stat_update("documents", value=documents)

    def _choose(self, file: int, records: Records) -> Records:
        if self.wanted is None:
            return records
        return _with_lines(records, set(np.load(self.wanted[file]).tolist()))


def _with_lines(records: Records, wanted: set[int]) -> Iterator[tuple[int, bytes | None]]:
    left = len(wanted)
    for line, raw in records:
        if line in wanted:
            yield line, raw
            left -= 1
            if not left:
                return


def by_chunk(data: DocumentsPipeline) -> Iterator[list[Document]]:
    """Documents in the batches in which they were read, which do not depend on how a file is divided."""
    for _, documents in groupby(data, key=lambda document: document.metadata["chunk"]):
        yield list(documents)


def progress_of(folder: Path) -> tuple[int, int]:
    """Documents and bytes that the shards which note their progress in ``folder`` have read."""
    documents = text_bytes = 0
    for note in folder.iterdir():
        numbers = note.read_text().split()
        if len(numbers) == 2:  # else it is being written
            documents, text_bytes = documents + int(numbers[0]), text_bytes + int(numbers[1])
    return documents, text_bytes
