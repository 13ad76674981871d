"""Documents to a Megatron data set: ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.json`` (see dataset_info.py).

This process reads the files and cuts them into chunks of records; other processes parse and tokenize them; this one
writes the results in the order of the input. So the output does not depend on the number of processes. On Slurm the
files are tokenized apart (see preprocess_shards.py), with bitwise the same result.
"""

import contextlib
import hashlib
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import cannot_write, fsync_path, temporary_folder
from flexolmo_megatron.shards.run import Where
from flexolmo_megatron.training.dataset_info import DatasetInfo
from flexolmo_megatron.training.document_pool import Chunk, read_chunks, work
from flexolmo_megatron.training.documents import DEFAULT_MAX_BAD, Bad, BadDocuments, find_files
from flexolmo_megatron.training.progress import DocumentProgress
from flexolmo_megatron.training.tokenizer import Tokenizer, load_tokenizer

SUFFIXES = (".bin", ".json", ".idx")
"""Files of a data set, in the order in which they appear: Megatron finds nothing before the .idx is there."""


class Encoded(NamedTuple):
    """The tokenized documents of one chunk, in order."""

    tokens: np.ndarray
    """All ids one after the other, each document with its end [sum of lengths], int32."""
    lengths: list[int]
    """Number of ids of each document."""
    text_bytes: list[int]
    """Size of each document as UTF-8."""
    positions: list[float]
    """A number in [0, 1) for each document that depends on its text and the seed alone."""
    bad: list[Bad]


def encode(tokenizer: Tokenizer, texts: Sequence[str], seed: int, bad: list[Bad]) -> Encoded:
    """Tokenize documents; ``bad`` is handed on."""
    ids: list[int] = []
    encoded = Encoded(np.empty(0), [], [], [], bad)
    for text in texts:
        start = len(ids)
        ids.extend(tokenizer.encode(text))
        ids.append(tokenizer.eod)
        data = text.encode("utf-8")
        digest = hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest()
        encoded.lengths.append(len(ids) - start)
        encoded.text_bytes.append(len(data))
        encoded.positions.append(int.from_bytes(digest, "big") / 2**64)
    return encoded._replace(tokens=np.array(ids, np.int32))


def _encoder(argument: tuple[Tokenizer, str, int]) -> Callable[[Chunk], Encoded]:
    tokenizer, text_key, seed = argument

    def encode_chunk(chunk: Chunk) -> Encoded:
        _, texts, bad = chunk.parse(text_key)
        return encode(tokenizer, texts, seed, bad)

    return encode_chunk


class Output:
    """One data set under construction in a temporary folder."""

    def __init__(self, prefix: Path, folder: Path, tokenizer: Tokenizer) -> None:
        """Begin the files of the data set ``prefix`` in ``folder``."""
        with warnings.catch_warnings():  # upstream warns at import about each CUDA-only package it does without
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.info = DatasetInfo(tokenizer.spec, tokenizer.vocab_size, tokenizer.eod)
        self._path = folder / prefix.name
        self._builder = IndexedDatasetBuilder(f"{self._path}.bin", DType.optimal_dtype(tokenizer.vocab_size))

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append a document."""
        self._builder.add_document(tokens, [len(tokens)])
        self.info.documents += 1
        self.info.tokens += len(tokens)
        self.info.text_bytes += text_bytes
        self.info.largest_token = max(self.info.largest_token, int(tokens.max()))

    def append(self, prefix: Path) -> None:
        """Append the documents of the finished data set at ``prefix``."""
        info = DatasetInfo.load(prefix)
        self._builder.add_index(str(prefix))
        self.info.documents += info.documents
        self.info.tokens += info.tokens
        self.info.text_bytes += info.text_bytes
        self.info.largest_token = max(self.info.largest_token, info.largest_token)

    def finish(self, skipped: Counter[str]) -> None:
        """Complete the files; ``skipped`` counts unusable documents by kind."""
        self.info.skipped = dict(sorted(skipped.items()))
        self._builder.finalize(f"{self._path}.idx")
        self.info.save(Path(f"{self._path}.json"))


@contextlib.contextmanager
def appear_together(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield a temporary folder, whose files move to ``paths`` (of one folder) when the block ends well: all or none."""
    try:
        with temporary_folder(paths[0]) as temporary:
            yield temporary
            for path in paths:
                fsync_path(temporary / path.name)
            moved: list[Path] = []
            try:
                for path in paths:
                    os.rename(temporary / path.name, path)
                    moved.append(path)
                fsync_path(paths[0].parent)
            except BaseException:
                for path in moved:
                    path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise cannot_write(paths[0], error) from error


def distribute(encoded: Encoded, outputs: Sequence[Output], valid_share: float) -> None:
    """Add documents to the only one of ``outputs``, or to the one for training or that for validation."""
    ends = np.cumsum(encoded.lengths)
    for end, length, size, position in zip(ends, encoded.lengths, encoded.text_bytes, encoded.positions, strict=True):
        outputs[position < valid_share].add(encoded.tokens[end - length : end], size)


def preprocess(inputs: Sequence[str], out: str | Path, *, tokenizer: dict[str, str], text_key: str = "text",
               workers: int = 1, max_bad: int = DEFAULT_MAX_BAD, valid_share: float = 0.0, seed: int = 0,
               shards: Where | None = None) -> tuple[dict[str, DatasetInfo], BadDocuments]:
    """Tokenize the documents of ``inputs`` into a Megatron data set, or into one for training and one for validation.

    Args:
        inputs: JSONL (.jsonl, .jsonl.gz, .jsonl.zst) and Parquet files, and glob patterns of such.
        out: prefix of the files written; with a ``valid_share``, ``out_train`` and ``out_valid`` are the prefixes.
        tokenizer: see ``load_tokenizer``.
        text_key: key of the JSON objects, or column, that holds the text.
        workers: processes that tokenize. The result does not depend on it.
        max_bad: unusable documents (see documents.py) that are skipped before the run stops.
        valid_share: expected share of the documents, in [0, 1), that goes to validation. The text of a document and
            the seed decide, so copies of a document stay together and more input moves no document.
        seed: of that choice.
        shards: if given, datatrove works on each file apart, there instead of in ``workers``; with the same result.

    Returns:
        What each data set holds, by prefix, and the documents that were skipped.

    Raises:
        FlexOlmoError: bad input, output that exists or cannot be written, an empty side of a split.
            Nothing was written then.
    """
    if workers < 1:
        raise FlexOlmoError(f"--workers {workers}: expected a number of at least 1")
    bad = BadDocuments(max_bad)
    if not 0 <= valid_share < 1:
        raise FlexOlmoError(f"--valid-share {valid_share}: expected a number from 0 to below 1, as in 0.05")
    files = find_files(inputs)
    prefixes = [Path(f"{out}_train"), Path(f"{out}_valid")] if valid_share else [Path(out)]
    if not prefixes[0].name:
        raise FlexOlmoError(f"--out {out}: expected a folder and a name, as in data/mine")
    paths = [Path(f"{prefix}{suffix}") for suffix in SUFFIXES for prefix in prefixes]
    for path in paths:
        if path.exists():
            raise FlexOlmoError(f"{path} already exists; name another --out or remove it first")
    loaded = load_tokenizer(tokenizer)
    state = None
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(appear_together(paths))
        outputs = [Output(prefix, folder, loaded) for prefix in prefixes]
        if shards:
            from flexolmo_megatron.training.preprocess_shards import tokenize_in_shards

            state = tokenize_in_shards(files, Path(out), outputs, bad, tokenizer=tokenizer, text_key=text_key,
                                       where=shards, valid_share=valid_share, seed=seed)
        else:
            results = work(read_chunks(enumerate(files), text_key), _encoder, (loaded, text_key, seed), workers,
                           "tokenizing process")
            progress = stack.enter_context(DocumentProgress())
            stack.enter_context(contextlib.closing(results))
            for encoded in results:
                for item in encoded.bad:
                    bad.add(item)
                distribute(encoded, outputs, valid_share)
                progress.add(len(encoded.lengths), sum(encoded.text_bytes))
        for output in outputs:
            if not output.info.documents:
                found = sum(other.info.documents for other in outputs)
                skipped = f"; {bad.report()}" if bad.counts else ""
                raise FlexOlmoError(f"no document for {output.prefix} among the {found} usable ones of "
                                    f"{len(files)} file{'s' * (len(files) != 1)}{skipped}")
            output.finish(bad.counts)
    if state:
        shutil.rmtree(state)
    return {str(output.prefix): output.info for output in outputs}, bad
