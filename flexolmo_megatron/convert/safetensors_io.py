"""Reading and writing safetensors files one tensor at a time, without mmap and without trusting the file.

Pages of a mmapped file count as resident memory of the process, so every read goes into a buffer of its own.
A header is read only after its size has been checked, and nothing is allocated before the file is known to hold it.
Files may come from a stranger: whatever is not exactly what the format says is refused.

Format: 8 bytes little-endian header length, JSON header, then the tensors' bytes without gaps.
"""

import json
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from flexolmo_megatron.convert.lazy import LazyTensor
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.streaming import memory, streaming_file

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""
MAX_DIMENSIONS = 8

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _reject_constant(text: str) -> None:
    raise ValueError(f"the number {text}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} twice")
    return result


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse_header(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)[:200]
        raise FlexOlmoError(f"{path}: the safetensors header is not valid JSON ({reason})") from None
    if not isinstance(header, dict):
        raise FlexOlmoError(f"{path}: the safetensors header is a {type(header).__name__}: expected a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FlexOlmoError(f"{path}: __metadata__ of the safetensors header: expected an object of strings")
    return header


def _parse_entry(name: str, entry: Any, data_start: int, path: Path) -> tuple[TensorInfo, int]:
    """Check one header entry; return it and the file position just past it."""
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FlexOlmoError(f"{where}: expected exactly dtype, shape and data_offsets in its header entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FlexOlmoError(f"{where}: dtype {str(dtype)[:40]!r}: expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_natural, shape)):
        raise FlexOlmoError(f"{where}: shape {str(shape)[:80]}: expected at most {MAX_DIMENSIONS} sizes of 0 or more")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)) or offsets[0] > offsets[1]:
        raise FlexOlmoError(f"{where}: data_offsets {str(offsets)[:80]}: expected [first byte, past the last byte]")
    info = TensorInfo(DTYPES[dtype], tuple(shape), data_start + offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        raise FlexOlmoError(f"{where}: data_offsets span {offsets[1] - offsets[0]} bytes: expected {info.nbytes} for "
                            f"shape {shape} of {dtype}")
    return info, data_start + offsets[1]


class Header(NamedTuple):
    """The checked header of a safetensors file."""

    raw: bytes
    """The file's first bytes, up to its first tensor."""
    entries: dict[str, TensorInfo]
    """By name, in the order of the data. Together the tensors cover the file's data without gap or overlap."""


def read_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file; its tensors stay on disk.

    Returns:
        ``Header.entries``.

    Raises:
        FlexOlmoError: the file is missing, or as for ``read_open_header``.
    """
    path = Path(path)
    try:
        with open(path, "rb", buffering=0) as file:
            return read_open_header(file.fileno(), path).entries
    except IsADirectoryError:
        raise FlexOlmoError(f"{path} is a directory: expected a safetensors file") from None
    except FileNotFoundError:
        raise FlexOlmoError(f"{path} does not exist; expected a safetensors file") from None
    except OSError as error:
        raise FlexOlmoError(f"{path} cannot be read: {error.strerror}") from error


def read_open_header(descriptor: int, where: str | os.PathLike, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check the header of an open safetensors file, whose position is neither used nor moved.

    Args:
        descriptor: of the file, open for reading.
        where: names the file in an error.
        max_header_bytes: a longer header is refused before memory is allocated for it.

    Raises:
        FlexOlmoError: no regular file, no safetensors file, truncated, or inconsistent in any way; or its header is
            larger than ``max_header_bytes``.
    """
    path = Path(where)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FlexOlmoError(f"{path} is not a file: expected a safetensors file")
    if status.st_size < 8:
        raise FlexOlmoError(f"{path} has {status.st_size} bytes: expected a safetensors file, which has at least 8")
    start = _read_bytes(descriptor, 0, 8, path)
    length = struct.unpack("<Q", start)[0]
    if length > max_header_bytes:
        raise FlexOlmoError(f"{path}: safetensors header of {length} bytes: expected at most {max_header_bytes}")
    if 8 + length > status.st_size:
        raise FlexOlmoError(f"{path} is truncated or no safetensors file: its header should have {length} bytes, the "
                            f"whole file has {status.st_size}")
    raw = _read_bytes(descriptor, 8, length, path)
    entries = {name: _parse_entry(name, entry, 8 + length, path) for name, entry in _parse_header(raw, path).items()}
    position = 8 + length
    ordered = sorted(entries.items(), key=lambda item: (item[1][0].offset, item[1][1]))
    for name, (info, end) in ordered:
        if info.offset != position:
            kind = "overlaps the one before it" if info.offset < position else "leaves a gap before it"
            raise FlexOlmoError(f"{path}: tensor {name[:200]!r} {kind}: starts at byte {info.offset}, expected "
                                f"{position}")
        position = end
    if position != status.st_size:
        problem = "is truncated" if position > status.st_size else "has trailing bytes"
        raise FlexOlmoError(f"{path} {problem}: {status.st_size} bytes, expected {position}")
    return Header(start + raw, {name: info for name, (info, _) in ordered})


def _read_bytes(descriptor: int, offset: int, length: int, path: Path) -> bytes:
    data = torch.empty(length, dtype=torch.uint8)
    read_exactly(descriptor, offset, data, path)
    return as_bytes(data).tobytes()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, as a view of its memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_exactly(descriptor: int, offset: int, target: torch.Tensor, path: Path) -> None:
    """Fill a contiguous CPU tensor with the bytes at ``offset`` of an open file; ``path`` names it in an error.

    Raises:
        FlexOlmoError: the file ends too early or cannot be read.
    """
    view = as_bytes(target)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise FlexOlmoError(f"{path} cannot be read: {error.strerror}") from error
        if count == 0:
            raise FlexOlmoError(f"{path} is truncated: {os.fstat(descriptor).st_size} bytes, expected at least "
                                f"{offset + len(view)}")
        done += count


def read_into(target: torch.Tensor, path: Path, offset: int) -> None:
    """Fill a contiguous CPU tensor with the bytes at ``offset`` of the file ``path``.

    Raises:
        FlexOlmoError: the file is gone, ends too early or cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            read_exactly(file.fileno(), offset, target, path)
    except OSError as error:
        raise FlexOlmoError(f"{path} cannot be read: {error.strerror}") from error


def read_tensor(path: str | os.PathLike, info: TensorInfo) -> torch.Tensor:
    """Read one tensor into fresh memory.

    Raises:
        FlexOlmoError: the file is gone, ends too early or cannot be read.
    """
    tensor = memory(info.nbytes).view(info.dtype).reshape(info.shape)
    read_into(tensor, Path(path), info.offset)
    return tensor


def _lazy(path: Path, info: TensorInfo) -> LazyTensor:
    return LazyTensor(info.dtype, info.shape, lambda: read_tensor(path, info))


def open_file(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """Open a safetensors file: its header is checked as in ``read_header``, its tensors are read when asked for."""
    path = Path(path)
    return {name: _lazy(path, info) for name, info in read_header(path).items()}


def write_tensors(file: IO[bytes], tensors: Mapping[str, LazyTensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file to an open binary file, holding one tensor in memory at a time.

    Tensors with larger elements come first, which keeps every tensor aligned; otherwise the given order is kept.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, tensor in ordered:
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(struct.pack("<Q", len(raw)) + raw)
    for name, lazy in ordered:
        tensor = lazy.read().contiguous()
        if tensor.dtype != lazy.dtype or tuple(tensor.shape) != tuple(lazy.shape):
            raise AssertionError(f"{name} was announced as {lazy.dtype} {lazy.shape}, read {tensor.dtype} "
                                 f"{tensor.shape}")
        file.write(as_bytes(tensor))
        del tensor  # before the next one is read


def split_shards(tensors: Mapping[str, LazyTensor], max_bytes: int) -> dict[str, dict[str, LazyTensor]]:
    """Distribute tensors, in order, over files of at most ``max_bytes`` (a larger tensor gets a file of its own).

    Returns:
        file name -> its tensors, with the names that ``save_pretrained`` of transformers gives.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        if shards[-1] and filled + nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_shards(directory: Path, tensors: Mapping[str, LazyTensor], max_bytes: int) -> None:
    """Write ``model.safetensors``, or several shards and ``model.safetensors.index.json``, into ``directory``."""
    shards = split_shards(tensors, max_bytes)
    for file_name, shard in shards.items():
        with streaming_file(directory / file_name) as file:
            write_tensors(file, shard, {"format": "pt"})
    if len(shards) > 1:
        total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
        index = {"metadata": {"total_size": total},
                 "weight_map": {name: file_name for file_name, shard in shards.items() for name in sorted(shard)}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
