"""Documents to a Megatron data set: ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.json`` (see dataset_info.py).

This process reads the files and cuts them into chunks of records; other processes parse and tokenize them; this one
writes the results in the order of the input. So the output does not depend on the number of processes.
"""

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import TEMPORARY_SUFFIX, fsync_path
from flexolmo_megatron.training.dataset_info import DatasetInfo
from flexolmo_megatron.training.documents import (
    DEFAULT_MAX_BAD,
    Bad,
    BadDocuments,
    find_files,
    parse_record,
    read_records,
)
from flexolmo_megatron.training.progress import DocumentProgress
from flexolmo_megatron.training.tokenizer import Tokenizer, load_tokenizer

CHUNK_BYTES = 1 << 20
"""Size of the piece of a file that one process tokenizes at a time: large against the cost of handing it over."""
CHUNKS_IN_FLIGHT = 4
"""Chunks per process that are read ahead, which bounds the memory."""
SUFFIXES = (".bin", ".json", ".idx")
"""Files of a data set, in the order in which they appear: Megatron finds nothing before the .idx is there."""

Records = list[tuple[int, bytes | None]]


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


def _encode_chunk(tokenizer: Tokenizer, path: Path, records: Records, text_key: str, seed: int) -> Encoded:
    ids: list[int] = []
    encoded = Encoded(np.empty(0), [], [], [], [])
    for line, raw in records:
        text = parse_record(path, line, raw, text_key)
        if isinstance(text, Bad):
            encoded.bad.append(text)
            continue
        start = len(ids)
        ids.extend(tokenizer.encode(text))
        ids.append(tokenizer.eod)
        data = text.encode("utf-8")
        digest = hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest()
        encoded.lengths.append(len(ids) - start)
        encoded.text_bytes.append(len(data))
        encoded.positions.append(int.from_bytes(digest, "big") / 2**64)
    return encoded._replace(tokens=np.array(ids, np.int32))


_worker_tokenizer: Tokenizer


def _start_worker(spec: dict[str, str]) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent sees to it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = load_tokenizer(spec)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        # Where the parent is killed nobody would tell this process to stop waiting for work.
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _encode_in_worker(*chunk: Any) -> Encoded:
    return _encode_chunk(_worker_tokenizer, *chunk)


def _read_chunks(files: Iterable[Path], text_key: str) -> Iterator[tuple[Path, Records]]:
    for path in files:
        records: Records = []
        size = 0
        for line, raw in read_records(path, text_key):
            records.append((line, raw))
            size += len(raw or b"")
            if size >= CHUNK_BYTES:
                yield path, records
                records, size = [], 0
        yield path, records


def _encode(files: Iterable[Path], tokenizer: Tokenizer, text_key: str, seed: int, workers: int) -> Iterator[Encoded]:
    """Yield the tokenized chunks in the order of the files."""
    chunks = _read_chunks(files, text_key)
    if workers == 1:
        for chunk in chunks:
            yield _encode_chunk(tokenizer, *chunk, text_key, seed)
        return
    # spawn: a fork of a process that has started threads, as torch does, may deadlock
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer.spec,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, *chunk, text_key, seed))
            if len(pending) > workers * CHUNKS_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise FlexOlmoError(f"a tokenizing process was killed (out of memory?); --workers {workers} may be too many") \
            from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Output:
    """One data set under construction in a temporary folder."""

    def __init__(self, prefix: Path, folder: Path, tokenizer: Tokenizer) -> None:
        with warnings.catch_warnings():  # upstream warns at import about each CUDA-only package it does without
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.info = DatasetInfo(tokenizer.spec, tokenizer.vocab_size, tokenizer.eod)
        self._path = folder / prefix.name
        self._builder = IndexedDatasetBuilder(f"{self._path}.bin", DType.optimal_dtype(tokenizer.vocab_size))

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        self._builder.add_document(tokens, [len(tokens)])
        self.info.documents += 1
        self.info.tokens += len(tokens)
        self.info.text_bytes += text_bytes
        self.info.largest_token = max(self.info.largest_token, int(tokens.max()))

    def finish(self, bad: BadDocuments) -> None:
        self.info.skipped = dict(sorted(bad.counts.items()))
        self._builder.finalize(f"{self._path}.idx")
        self.info.save(Path(f"{self._path}.json"))


@contextlib.contextmanager
def _appear_together(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield a temporary folder, whose files move to ``paths`` (of one folder) when the block ends well: all or none."""
    folder = paths[0].parent
    temporary = None
    moved: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(TEMPORARY_SUFFIX, f".{paths[0].name}.", folder))
        yield temporary
        for path in paths:
            fsync_path(temporary / path.name)
        for path in paths:
            os.rename(temporary / path.name, path)
            moved.append(path)
        fsync_path(folder)
    except BaseException as error:
        for path in moved:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise FlexOlmoError(f"cannot write {paths[0]}: {reason}; nothing was changed there") from error
        raise
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def preprocess(inputs: Sequence[str], out: str | Path, *, tokenizer: dict[str, str], text_key: str = "text",
               workers: int = 1, max_bad: int = DEFAULT_MAX_BAD, valid_share: float = 0.0,
               seed: int = 0) -> tuple[dict[str, DatasetInfo], BadDocuments]:
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

    Returns:
        What each data set holds, by prefix, and the documents that were skipped.

    Raises:
        FlexOlmoError: bad input, output that exists or cannot be written, an empty side of a split.
            Nothing was written then.
    """
    if workers < 1:
        raise FlexOlmoError(f"--workers {workers}: expected a number of at least 1")
    if max_bad < 0:
        raise FlexOlmoError(f"--max-bad {max_bad}: expected a number of at least 0")
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
    bad = BadDocuments(max_bad)
    with _appear_together(paths) as folder, DocumentProgress() as progress, \
            contextlib.closing(_encode(files, loaded, text_key, seed, workers)) as chunks:
        outputs = [_Output(prefix, folder, loaded) for prefix in prefixes]
        for encoded in chunks:
            for item in encoded.bad:
                bad.add(item)
            ends = np.cumsum(encoded.lengths)
            for end, length, size, position in zip(ends, encoded.lengths, encoded.text_bytes, encoded.positions,
                                                   strict=True):
                outputs[position < valid_share].add(encoded.tokens[end - length:end], size)
            progress.add(len(encoded.lengths), sum(encoded.text_bytes))
        for output in outputs:
            if not output.info.documents:
                found = sum(other.info.documents for other in outputs)
                skipped = f"; {bad.report()}" if bad.counts else ""
                raise FlexOlmoError(f"no document for {output.prefix} among the {found} usable ones of "
                                    f"{len(files)} file{'s' * (len(files) != 1)}{skipped}")
            output.finish(bad)
    return {str(output.prefix): output.info for output in outputs}, bad
