"""Whether a checkpoint still holds, byte for byte, what was written: a record of its files, made with it.

``integrity.json`` names every file with its size and its sha256. Each rank hashes the files that it has just written,
from the page cache; before a checkpoint is loaded the files are shared out over all ranks. Since the ranks also share
out what they write, each hashes about as many bytes as it writes, and a single wrong bit in the weights would cost the
run. Where storage does that work already, ``checkpoint_hash=false`` leaves the sha256 of tensor files out; names, sizes
and the hashes of the small files, which torch unpickles, are always compared.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from flexolmo_megatron.config.card import CARD_FILE
from flexolmo_megatron.convert.torch_metadata import METADATA_FILE
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import read_json, write_json
from flexolmo_megatron.runtime.ranks import on_first_rank

RECORD_FILE = "integrity.json"
FORMAT_VERSION = 1
SMALL_FILES = (METADATA_FILE, COMMON_STATE_FNAME, CONFIG_FNAME, CARD_FILE)
"""What every checkpoint has beside its tensor files."""

Files = dict[str, dict[str, Any]]
"""By name: {"bytes": size, "sha256": hexadecimal or None}."""


def describe_file(path: Path, hashed: bool) -> dict[str, Any]:
    """The record of one file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hashed else None
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_record(folder: Path, files: Files) -> None:
    """Add the small files to what the ranks have written, check that all are there, and save the record.

    Raises:
        FlexOlmoError: a file that another rank has written is not to be seen, or not whole.
        OSError: a file cannot be read or written.
    """
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != recorded["bytes"]:
            raise FlexOlmoError(f"{name}, which another process has written, is not there in full: expected a folder "
                                "that all processes share")
    small = {name: describe_file(folder / name, hashed=True) for name in SMALL_FILES}
    write_json(folder / RECORD_FILE, {"format_version": FORMAT_VERSION, "files": {**files, **small}})


def damage(folder: Path, hashed: bool) -> str | None:
    """What is wrong with a checkpoint, or None. Called by all ranks, which all get the same answer.

    Args:
        folder: the checkpoint.
        hashed: compare the sha256 of tensor files, too.

    Raises:
        FlexOlmoError: the record is of a later version of this package, which this one cannot judge.
    """
    problem, files = on_first_rank(lambda: _damage_at_first_sight(folder))
    if problem or not files:
        return problem
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = sorted(files, key=lambda name: files[name]["bytes"])
    own = [name for name in names[rank::ranks] if files[name]["sha256"] and (hashed or name in SMALL_FILES)]
    problems: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(problems, _changed(folder, files, own))
    return next(filter(None, problems), None)


def _damage_at_first_sight(folder: Path) -> tuple[str | None, Files]:
    """What names and sizes show, and the files to be hashed."""
    record = folder / RECORD_FILE
    if not record.exists():
        return f"{RECORD_FILE} is missing", {}
    try:
        content = read_json(record, "the record of a checkpoint's files")
        version = int(content["format_version"])
        files = content["files"] if version == FORMAT_VERSION else {}
        sizes = {name: int(recorded["bytes"]) for name, recorded in files.items()}
        hashes = {name: recorded["sha256"] for name, recorded in files.items()}
    except (FlexOlmoError, KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return f"{RECORD_FILE} is damaged", {}
    if version > FORMAT_VERSION:
        raise FlexOlmoError(
            f"{record}: format_version = {version}: expected {FORMAT_VERSION}; a later version of flexolmo-megatron "
            f"has written this checkpoint: go on with that one, or name a new folder (out)"
        )
    if missing := sorted(set(SMALL_FILES) - set(hashes)):
        return f"{RECORD_FILE} does not name {missing[0]}", {}
    for name, size in sizes.items():
        if Path(name).name != name:
            return f"{RECORD_FILE} names {name!r}, which is no file in the folder", {}
        path = folder / name
        if not path.is_file():
            return f"{name} is missing", {}
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes; {size:,} were written", {}
    return None, files


def _changed(folder: Path, files: Files, names: list[str]) -> str | None:
    """The first of ``names`` whose content is not what was written."""
    for name in names:
        try:
            if describe_file(folder / name, hashed=True)["sha256"] != files[name]["sha256"]:
                return f"{name} is not what was written (its sha256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None
