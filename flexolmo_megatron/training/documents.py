"""Streaming documents out of JSONL (plain, .gz, .zst) and Parquet files, with every unusable one counted and located.

Reading is split in two so that the costly half can run in other processes: ``read_records`` only decompresses and cuts
a file into records of raw bytes, ``parse_record`` turns one record into text. ``stream_documents`` does both. Nothing
here is held beyond the record at hand (a Parquet file: the batch at hand).
"""

import codecs
import glob
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

from flexolmo_megatron.errors import FlexOlmoError, nearest

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DEFAULT_MAX_BAD = 100
_SHOWN = 5
_PARQUET_BATCH = 1024


class Document(NamedTuple):
    """One document and where it is."""

    text: str
    file: Path
    line: int
    """Line of the JSONL file or row of the Parquet file, from 1."""


class Bad(NamedTuple):
    """A record that holds no usable document."""

    kind: str
    """One of: broken JSON, missing text, text is not a string, empty document, bad UTF-8."""
    file: Path
    line: int


@dataclass
class BadDocuments:
    """Counts unusable documents and stops the run when there are more than ``limit``."""

    limit: int
    """Number of unusable documents over all files that is still accepted; 0 accepts none."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of unusable documents of each kind."""
    first: list[Bad] = field(default_factory=list)
    """The first few, to be shown."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise FlexOlmoError(f"--max-bad {self.limit}: expected a number of at least 0")

    def add(self, bad: Bad) -> None:
        """Count one.

        Raises:
            FlexOlmoError: it is one more than the limit.
        """
        self.counts[bad.kind] += 1
        if len(self.first) < _SHOWN:
            self.first.append(bad)
        self.check()

    def check(self) -> None:
        """Raise FlexOlmoError if there are more than the limit."""
        if self.counts.total() > self.limit:
            raise FlexOlmoError(f"{self.report()}: more than the {self.limit} that --max-bad allows")

    def report(self) -> str:
        """For example ``2 unusable documents (2 broken JSON), first a.jsonl:3 (broken JSON), ...``.

        Where only their ``counts`` are known, without the places.
        """
        total = self.counts.total()
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        places = ", ".join(f"{bad.file}:{bad.line} ({bad.kind})" for bad in self.first)
        return f"{total} unusable document{'s' * (total != 1)} ({kinds})" + f", first {places}" * bool(places)


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Files that ``inputs`` (paths and glob patterns, ``**`` included) name, each once, a pattern's matches sorted.

    Raises:
        FlexOlmoError: an input matches nothing, is a folder, or has a suffix that is none of ``SUFFIXES``.
    """
    files: dict[Path, None] = {}
    for given in inputs:
        matches = [Path(given)] if Path(given).exists() else [Path(match) for match in glob.glob(given, recursive=True)]
        if not matches:
            raise FlexOlmoError(f"{given} does not exist; expected a file or a pattern that matches one "
                                f"({', '.join(SUFFIXES)})")
        for path in sorted(matches):
            if path.is_dir():
                raise FlexOlmoError(f"{path} is a folder; expected files, for example '{path}/*.jsonl'")
            if not path.name.endswith(SUFFIXES):
                raise FlexOlmoError(f"{path}: unknown kind of file; expected a name that ends in {', '.join(SUFFIXES)}")
            files.setdefault(path)
    return list(files)


def check_apart(owner: Sequence[Path], public: Sequence[Path]) -> None:
    """Raise FlexOlmoError if a file is both an owner's and public."""
    both = {path.resolve() for path in owner} & {path.resolve() for path in public}
    if both:
        raise FlexOlmoError(f"{min(both)} is named both as the owner's and as public: expected different files")


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FlexOlmoError(f"{path} needs pyarrow; install it with: pip install pyarrow") from None
    return pyarrow


def _open_lines(path: Path) -> BinaryIO:
    """The decompressed bytes of a JSONL file."""
    if path.name.endswith(".gz"):
        return gzip.open(path)
    if path.name.endswith(".zst"):
        # Not the zstandard package: its stream reader takes a truncated file for a complete one.
        return io.BufferedReader(_pyarrow(path).CompressedInputStream(str(path), "zstd"), 1 << 20)
    return open(path, "rb")


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    line = 0
    try:
        with _open_lines(path) as file:
            for line, raw in enumerate(file, 1):
                if line == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                if not raw.isspace():
                    yield line, raw
    except (OSError, EOFError, zlib.error) as error:  # of gzip: EOFError if truncated, zlib.error if damaged
        raise FlexOlmoError(f"{path} cannot be read after line {line}: {error}") from error


def _read_rows(path: Path, text_key: str) -> Iterator[tuple[int, bytes | None]]:
    pyarrow = _pyarrow(path)
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                raise FlexOlmoError(f"{path} has no column {text_key!r}{nearest(text_key, schema.names)}; "
                                    f"its columns are {', '.join(schema.names)}")
            kind = schema.field(text_key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise FlexOlmoError(f"{path}: column {text_key!r} is of type {kind}; expected string")
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=[text_key]):
                # As bytes: Arrow does not check that its strings are UTF-8, and one bad value must not cost the batch.
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    yield row, value
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise FlexOlmoError(f"{path} cannot be read as Parquet after row {row}: {reason}") from error


def is_parquet(path: Path) -> bool:
    """Whether the records of ``path`` are the text itself rather than JSON objects."""
    return path.name.endswith(".parquet")


def read_records(path: Path, text_key: str) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line or row from 1, raw bytes): of JSONL the line, of Parquet the text (None for null).

    Blank lines are skipped.

    Raises:
        FlexOlmoError: the file cannot be read, is damaged (says up to which line it was fine), or has no such column.
    """
    return _read_rows(path, text_key) if is_parquet(path) else _read_lines(path)


def parse_record(path: Path, line: int, raw: bytes | None, text_key: str) -> str | Bad:
    """Text of one record of ``read_records``, or what is wrong with it."""
    if raw is None:
        return Bad("missing text", path, line)
    try:
        text = raw.decode("utf-8")
        if not is_parquet(path):
            record = json.loads(text)
            if not isinstance(record, dict) or record.get(text_key) is None:
                return Bad("missing text", path, line)
            text = record[text_key]
            if not isinstance(text, str):
                return Bad("text is not a string", path, line)
            text.encode("utf-8")  # JSON can spell half a surrogate pair, which no UTF-8 can hold
    except UnicodeError:
        return Bad("bad UTF-8", path, line)
    except (ValueError, RecursionError):  # ValueError: also a number with too many digits for int
        return Bad("broken JSON", path, line)
    return text if text.strip() else Bad("empty document", path, line)


def stream_documents(inputs: Sequence[str], text_key: str = "text",
                     bad: BadDocuments | None = None) -> Iterator[Document]:
    """Yield the usable documents of all files, in order.

    Args:
        inputs: files and glob patterns.
        text_key: key of the JSON objects, or column, that holds the text.
        bad: counts the others; by default up to ``DEFAULT_MAX_BAD`` are skipped.

    Raises:
        FlexOlmoError: see ``find_files``, ``read_records`` and ``BadDocuments``.
    """
    bad = bad or BadDocuments(DEFAULT_MAX_BAD)
    for path in find_files(inputs):
        for line, raw in read_records(path, text_key):
            parsed = parse_record(path, line, raw, text_key)
            if isinstance(parsed, Bad):
                bad.add(parsed)
            else:
                yield Document(parsed, path, line)
