"""Reading a Megatron checkpoint (torch_dist dist_checkpointing directory) without Megatron, one tensor at a time.

Any chunking is read: whatever tensor, pipeline and expert parallel sizes the checkpoint was saved with.
Writing is in ``megatron_writer.py``.

An anchor comes from somebody else, so nothing here is trusted: ``torch_metadata.py`` unpickles records of tensors
alone, tensors are read with ``weights_only``, and from files of the checkpoint's own folder.
"""

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.convert.huggingface import check_dtypes
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.names import (
    Box,
    Piece,
    check_tensors,
    expected_tensors,
    intersect,
    megatron_tensors,
    slices,
)
from flexolmo_megatron.convert.rows import open_rows
from flexolmo_megatron.convert.safetensors_io import read_into
from flexolmo_megatron.convert.tokenizer_files import tokenizer_folder, tokenizer_in
from flexolmo_megatron.convert.torch_metadata import METADATA_FILE, read_metadata
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.untrusted import shown

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""What a checkpoint holds under other names (optimizer, random states) is not the model's."""


@dataclass(frozen=True)
class _Chunk:
    """One stored part of a tensor: a torch.save record inside a .distcp file."""

    path: Path
    start: int
    length: int
    box: Box
    """Its place in the global tensor."""
    dtype: torch.dtype

    def _load(self, **options) -> torch.Tensor:
        try:
            with open(self.path, "rb", buffering=0) as file:
                return torch.load(_create_file_view(file, self.start, self.length), weights_only=True, **options)
        except Exception as error:  # a damaged record can raise anything
            raise FlexOlmoError(f"{self.path}: the record at byte {self.start} cannot be read, the file is truncated "
                                f"or damaged ({type(error).__name__})") from error

    @cached_property
    def _data_offset(self) -> int | None:
        """Byte of the file where the chunk's numbers start; None if they are not one contiguous block."""
        stored = self._load(map_location="meta")
        shape = tuple(last - first for first, last in self.box)
        if stored.dtype != self.dtype or tuple(stored.shape) != shape:
            raise FlexOlmoError(f"{self.path}: the record at byte {self.start} holds {stored.dtype} "
                                f"{list(stored.shape)}: expected {self.dtype} {list(shape)}, as {METADATA_FILE} says")
        inside = getattr(stored.untyped_storage(), "_checkpoint_offset", None)
        if inside is None or not stored.is_contiguous():
            return None
        return self.start + inside + stored.storage_offset() * self.dtype.itemsize

    def read_into(self, target: torch.Tensor, part: Box) -> None:
        """Copy ``part`` (a box of the global tensor, inside this chunk, of one expert) into ``target``."""
        if self._data_offset is None:
            target.copy_(self._load(map_location="cpu")[slices(part, self.box)].reshape(target.shape))
            return
        # Rows are contiguous on disk, so only the wanted rows are read; of these, all columns.
        *outer, (first_row, last_row) = part[:-1] if len(part) > 1 else part
        width = self.box[-1] if len(part) > 1 else (0, 1)
        columns = part[-1] if len(part) > 1 else (0, 1)
        row = first_row - self.box[len(outer)][0]
        for (index, _), (corner, _) in zip(outer, self.box, strict=False):
            row += (index - corner) * (self.box[len(outer)][1] - self.box[len(outer)][0])
        row_bytes = (width[1] - width[0]) * self.dtype.itemsize
        direct = columns == width and target.is_contiguous()
        rows = target if direct else torch.empty((last_row - first_row, width[1] - width[0]), dtype=self.dtype)
        read_into(rows, self.path, self._data_offset + row * row_bytes)
        if not direct:
            target.copy_(rows[:, columns[0] - width[0]:columns[1] - width[0]].reshape(target.shape))


def _chunks(key: str, stored: TensorStorageMetadata, storage: dict, directory: Path) -> list[_Chunk]:
    chunks = []
    for chunk in stored.chunks:
        box = tuple((first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True))
        if not all(type(first) is int and type(last) is int and 0 <= first <= last <= size
                   for (first, last), size in zip(box, stored.size, strict=True)):
            raise FlexOlmoError(f"{directory}: a part of {key} is said to be at {list(chunk.offsets)} with the sizes "
                                f"{list(chunk.sizes)}: expected a part of {list(stored.size)}")
        place = storage.get(MetadataIndex(key, chunk.offsets))
        if place is None or getattr(place, "transform_descriptors", None):
            raise FlexOlmoError(f"{directory}: the part of {key} at {list(chunk.offsets)} is "
                                f"{'missing' if place is None else 'compressed'}: expected a plain torch_dist record")
        name, start, length = place.relative_path, place.offset, place.length
        if Path(name).name != name or min(start, length) < 0:
            raise FlexOlmoError(f"{directory}: the part of {key} at {list(chunk.offsets)} is said to be {length} bytes "
                                f"at {start} of {shown(name)}: expected a place in a file of this folder")
        chunks.append(_Chunk(directory / name, start, length, box, stored.properties.dtype))
    held = sum(math.prod(last - first for first, last in chunk.box) for chunk in chunks)
    if held != math.prod(stored.size):
        raise FlexOlmoError(f"{directory}: tensor {key} has {held} of {math.prod(stored.size)} numbers: expected a "
                            "complete checkpoint")
    return chunks


def _check_files(chunks: list[_Chunk]) -> None:
    ends: dict[Path, int] = {}
    for chunk in chunks:
        ends[chunk.path] = max(ends.get(chunk.path, 0), chunk.start + chunk.length)
    for path, end in ends.items():
        if not path.is_file():
            raise FlexOlmoError(f"{path.parent}: {shown(path.name)} is missing: expected it beside {METADATA_FILE}, "
                                "which names it")
        if (size := path.stat().st_size) < end:
            raise FlexOlmoError(f"{path} is truncated: {size} bytes, expected at least {end}")


def _read_canonical(shape: tuple[int, ...], dtype: torch.dtype,
                    sources: list[tuple[Piece, list[_Chunk]]]) -> torch.Tensor:
    result = torch.zeros(shape, dtype=dtype)  # parts that overlap may leave a hole: never what memory held before
    for piece, chunks in sources:
        for chunk in chunks:
            part = intersect(piece.box, chunk.box)
            if part is not None:
                canonical, _ = piece.within(part)
                chunk.read_into(result[slices(canonical)], part)
    return result


def open_megatron(directory: str | os.PathLike) -> LazyModel:
    """Open a Megatron checkpoint with a ``flexolmo.json``; it may come from anyone.

    Raises:
        FlexOlmoError: a file is missing, truncated or damaged; a tensor is missing, unexpected, or of the wrong shape
            or dtype.
    """
    directory = Path(directory)
    card = ModelCard.load(directory)
    metadata = read_metadata(directory)
    stored = {key: value for key, value in metadata.state_dict_metadata.items()
              if key.startswith(_MODEL_PREFIXES) and isinstance(value, TensorStorageMetadata)}
    table = megatron_tensors(card.model, card.kind)
    check_tensors({key: _Stored(tuple(value.size)) for key, value in stored.items()},
                  {key: tensor.shape for key, tensor in table.items()}, str(directory))
    sources: dict[str, list[tuple[Piece, list[_Chunk]]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    all_chunks = []
    for key, tensor in table.items():
        try:
            chunks = _chunks(key, stored[key], metadata.storage_data, directory)
        except FlexOlmoError:
            raise
        except (AttributeError, TypeError, ValueError) as error:  # fields of any type: a pickle promises none
            raise FlexOlmoError(f"{directory}: what {METADATA_FILE} says about {key} is damaged: {error}") from error
        all_chunks += chunks
        for piece in tensor.pieces:
            sources.setdefault(piece.name, []).append((piece, chunks))
            dtypes[piece.name] = stored[key].properties.dtype
    _check_files(all_chunks)
    tensors = {name: LazyTensor(dtypes[name], shape, partial(_read_canonical, shape, dtypes[name], sources[name]))
               for name, shape in expected_tensors(card.model, card.kind).items()}
    check_dtypes(tensors, str(directory))
    if card.tokenizer["type"] == "huggingface" and tokenizer_folder(card.tokenizer) is None:
        # The folder is gone, or the checkpoint is on another machine; that folder goes first, since it may hold more.
        card = replace(card, tokenizer=tokenizer_in(directory) or card.tokenizer)
    return LazyModel(card, tensors, open_rows(directory, card))


@dataclass(frozen=True)
class _Stored:
    shape: tuple[int, ...]
