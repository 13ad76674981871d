"""What an audit has found so far, one line of JSON per passage, so that an interrupted one goes on where it was."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.audit_passages import Passage
from flexolmo_megatron.evaluation.audit_results import Similarity
from flexolmo_megatron.evaluation.settings import check_same_settings

SIMILARITIES = "similarities.jsonl"


class AuditState:
    """The file ``similarities.jsonl`` of an audit's folder: its settings, then a line for each model and passage."""

    def __init__(self, folder: Path, setup: dict[str, Any], *, texts: bool) -> None:
        """Begin, or go on with, the audit of ``setup`` in ``folder``.

        Raises:
            FlexOlmoError: the folder holds something else, or the audit has other settings; the first is named.
        """
        self._path = folder / SIMILARITIES
        self._texts = texts
        self._found: dict[tuple[str, str, int], Similarity] = {}
        self._made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                whole = self._read(setup)
                os.truncate(self._path, whole)
            elif any(folder.iterdir()):
                raise FlexOlmoError(f"{folder} already exists and holds no audit; name a new directory")
            self._file: IO[str] = self._path.open("a", encoding="utf-8")
            if self._file.tell() == 0:
                self._write({"setup": setup})
        except OSError as error:
            raise self._as_error(error) from error

    def _read(self, setup: dict[str, Any]) -> int:
        """Read the lines; returns the bytes of those that are whole: a kill may have torn the last one."""
        whole = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                    if value is None:
                        break
                    if number == 0:
                        check_same_settings(self._path.parent, "an audit", value["setup"], setup)
                    else:
                        key = value["model"], value["corpus"], int(value["key"])
                        self._found[key] = Similarity(float(value["passage"]), float(value["continuation"]))
                except (KeyError, TypeError, json.JSONDecodeError) as error:
                    raise FlexOlmoError(f"{self._path} is damaged in line {number + 1}: remove it to start "
                                        "again") from error
                whole += len(line)
        return whole

    def _as_error(self, error: OSError) -> FlexOlmoError:
        return FlexOlmoError(f"cannot write {self._path}: {error.strerror or error}")

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> "AuditState":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._file.close()
        if kind and not self._found:  # there is nothing to go on with
            self._path.unlink()
            if self._made:
                self._path.parent.rmdir()

    def get(self, model: str, corpus: str, passage: Passage) -> Similarity | None:
        """What was found for a passage; None if nothing yet."""
        return self._found.get((model, corpus, passage.key))

    def add(self, model: str, corpus: str, passage: Passage, found: Similarity, sample: str,
            decode: Callable[[Iterable[int]], str]) -> None:
        """Keep what was found for a passage.

        Raises:
            FlexOlmoError: the file cannot be written.
        """
        self._found[model, corpus, passage.key] = found
        value = {"model": model, "corpus": corpus, "key": passage.key, "passage": found.passage,
                 "continuation": found.continuation, "place": passage.place, "first_token": passage.first}
        if self._texts:
            value |= {"text": decode(passage.tokens), "best_sample": sample}
        try:
            self._write(value)
        except OSError as error:
            raise self._as_error(error) from error
