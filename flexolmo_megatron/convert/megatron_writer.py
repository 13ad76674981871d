"""Writing a Megatron checkpoint (torch_dist dist_checkpointing directory) without Megatron, one tensor at a time.

The files are what torch.distributed.checkpoint writes and ``megatron.core.dist_checkpointing.load`` reads, with the
chunks that Megatron itself would store on one rank: gate and up halves apart, one chunk per expert.
torch's own writer is not used for the tensors because it keeps all of a file's tensors in memory until the file ends.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.names import (
    MegatronTensor,
    check_tensors,
    expected_tensors,
    fill_region,
    megatron_tensors,
)
from flexolmo_megatron.convert.rows import save_rows
from flexolmo_megatron.convert.tokenizer_files import copy_tokenizer
from flexolmo_megatron.files import atomic_directory, write_json
from flexolmo_megatron.streaming import streaming_file

MAX_FILE_BYTES = 5_000_000_000
"""A new .distcp file is begun past this size."""

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
           "common_backend": "torch", "common_backend_version": 1}


def _write_items(tensor: MegatronTensor, dtype: torch.dtype) -> Iterator[WriteItem]:
    for number, box in enumerate(tensor.chunks):
        offsets = torch.Size(first for first, _ in box)
        sizes = torch.Size(last - first for first, last in box)
        yield WriteItem(
            index=MetadataIndex(tensor.key, offsets, number),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=ChunkStorageMetadata(offsets, sizes), size=torch.Size(tensor.shape),
                                        properties=TensorProperties(dtype=dtype)),
        )


def _save(tensor: torch.Tensor, file: IO[bytes]) -> None:
    """torch.save, but a full disk stays an OSError: torch hides it behind a RuntimeError about its own bookkeeping."""
    try:
        torch.save(tensor, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise (cause or error) from None


def _write_record(file: IO[bytes], file_name: str, item: WriteItem, tensor: torch.Tensor) -> WriteResult:
    start = file.tell()
    _save(tensor, file)
    length = file.tell() - start
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(file_name, start, length))


def _write_records(directory: Path, items: list[WriteItem], table: dict[str, MegatronTensor],
                   model: LazyModel) -> list[WriteResult]:
    results: list[WriteResult] = []
    remaining = iter(items)
    item = next(remaining, None)
    while item is not None:
        file_name = f"__0_{len({result.storage_data.relative_path for result in results})}.distcp"
        with streaming_file(directory / file_name) as file:
            while item is not None and file.tell() < MAX_FILE_BYTES:
                chunk = item.tensor_data.chunk
                tensor = fill_region(table[item.index.fqn], tuple(chunk.offsets), tuple(chunk.sizes), model.tensors)
                results.append(_write_record(file, file_name, item, tensor))
                del tensor
                item = next(remaining, None)
    return results


def write_megatron(model: LazyModel, directory: Path) -> None:
    """Write the files of a checkpoint into an existing, empty directory. See ``save_megatron``."""
    card = model.card
    check_tensors(model.tensors, expected_tensors(card.model, card.kind), "the model to save")
    table = megatron_tensors(card.model, card.kind)
    items = [item for tensor in table.values()
             for item in _write_items(tensor, model.tensors[tensor.pieces[0].name].dtype)]
    _, metadata = create_default_global_save_plan([SavePlan(items)])
    computes_crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # checksums cost time, and torch.load never checks them
    try:
        results = _write_records(directory, items, table, model)
        torch.save({}, directory / "common.pt")
    finally:
        torch.serialization.set_crc32_options(computes_crc)
    FileSystemWriter(directory, sync_files=False).finish(metadata, [results])
    write_json(directory / "metadata.json", _FORMAT)
    save_rows(model, directory)
    copy_tokenizer(card.tokenizer, directory)
    card.save(directory)


def save_megatron(model: LazyModel, path: str | os.PathLike) -> None:
    """Write a Megatron checkpoint with a ``flexolmo.json``; any kind.

    Args:
        model: tensors are read once each (q, k and v together, to be interleaved), one Megatron tensor at a time.
        path: a new directory, created whole or not at all.

    Raises:
        FlexOlmoError: a tensor is missing, unexpected or of the wrong shape; tensors that form one Megatron tensor
            differ in dtype; ``path`` cannot be written.
    """
    with atomic_directory(path) as directory:
        write_megatron(model, directory)
