"""Values of documents beside their text: of the same JSON object, or of other columns of the row."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.training.documents import is_parquet

_BATCH = 1024


def values_of(path: Path, keys: Sequence[str]) -> Callable[[int, bytes | None], dict[str, Any]]:
    """Return a function that gives a record's values, from its line and bytes as ``read_records`` gives them.

    Args:
        path: JSONL or Parquet file. Of a Parquet file, records must be asked for in ascending order.
        keys: names; of JSON objects, ``a.b`` is also ``b`` of the object ``a``. A value that is missing is None.
    """
    if not is_parquet(path):
        return lambda _, raw: _look_up(json.loads(raw), keys)
    rows = enumerate(_read_rows(path, keys), 1)

    def advance(line: int, _: bytes | None) -> dict[str, Any]:
        return next(values for row, values in rows if row == line)

    return advance


def _look_up(record: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    values = {}
    for key in keys:
        value: Any = record
        for name in [key] if key in record else key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        values[key] = value
    return values


def _read_rows(path: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        known = file.schema_arrow.names
        for key in keys:
            if key not in known:
                raise FlexOlmoError(f"{path} has no column {key!r}{nearest(key, known)}; its columns are "
                                    f"{', '.join(known)}")
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(keys)):
            yield from batch.to_pylist()
