"""Tokenizing a shard, as the step of a datatrove pipeline."""

import shutil
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from flexolmo_megatron.files import atomic_directory, write_json
from flexolmo_megatron.shards.documents import ReadDocuments, by_chunk
from flexolmo_megatron.training.preprocess import Output, distribute, encode
from flexolmo_megatron.training.tokenizer import load_tokenizer

BAD = "bad.json"
"""Counts of a shard's unusable documents by kind, beside its data sets 0 and, for validation, 1."""


class Tokenize(PipelineStep):
    """Writes the data sets of a shard, which may be empty; passes nothing on."""

    type = "TOKENIZER"
    name = "Megatron"

    def __init__(self, state: Path, reader: ReadDocuments, tokenizer: dict[str, str], outputs: int,
                 valid_share: float, seed: int) -> None:
        super().__init__()
        self.state, self.reader, self.tokenizer = state, reader, tokenizer
        self.outputs, self.valid_share, self.seed = outputs, valid_share, seed

    def folder(self, shard: int) -> Path:
        """Where the data sets of a shard are."""
        return self.state / f"shard_{shard:06d}"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Tokenize and write."""
        tokenizer = load_tokenizer(self.tokenizer)
        shutil.rmtree(self.folder(rank), ignore_errors=True)  # of a task that was stopped when all but told
        with atomic_directory(self.folder(rank)) as folder:
            outputs = [Output(Path(str(number)), folder, tokenizer) for number in range(self.outputs)]
            for batch in by_chunk(data):
                texts = [document.text for document in batch]
                distribute(encode(tokenizer, texts, self.seed, []), outputs, self.valid_share)
            for output in outputs:
                output.finish(self.reader.bad.counts)
            write_json(folder / BAD, self.reader.bad.counts)
        yield from ()
