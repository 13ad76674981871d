"""``.metadata`` of a torch_dist checkpoint, which is a pickle, read so that it cannot run code.

torch.distributed.checkpoint has no such reader: its own calls ``pickle.load``. Here a name that is not on the short
list of what such files hold is refused before it is imported ("Restricting Globals" in Python's documentation of
pickle).
"""

import pickle
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.untrusted import shown

METADATA_FILE = ".metadata"
_ALLOWED = {(known.__module__, known.__qualname__): known for known in (
    BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties,
    TensorStorageMetadata, _MEM_FORMAT_ENCODING, filesystem._StorageInfo, planner.BytesIOWriteData, planner.SavePlan,
    planner.TensorWriteData, planner.WriteItem, planner.WriteItemType, torch.serialization._get_layout)}
_ALLOWED |= {("torch", "Size"): torch.Size, ("pathlib", "PosixPath"): Path, ("pathlib._local", "PosixPath"): Path}
_ALLOWED |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# As megatron-core before 0.16 called them; 0.16 itself keeps stand-ins for them, to the same end.
_ALLOWED |= {("megatron.core.dist_checkpointing.strategies.torch", name): known
             for name, known in (("MCoreSavePlan", planner.SavePlan), ("MCoreMetadata", Metadata))}
"""All that checkpoints of megatron-core, Megatron-LM, Megatron-Bridge and NeMo name: records of sizes and places."""
_RECORDS = tuple(known for known in _ALLOWED.values() if isinstance(known, type) and is_dataclass(known))


class _Refused(pickle.UnpicklingError):
    pass


class _Unpickler(pickle._Unpickler):
    """Python's own, slower than that in C: only here BUILD can be held to records. On a class it would set attributes
    for the rest of the process, also where the file is refused in the end."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _RECORDS):
            raise _Refused("changes something else than a record of a checkpoint; it is refused because it could run "
                           "code")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"names {shown(f'{module}.{name}')}, which the metadata of a checkpoint never does; it is "
                           "refused because it could run code")
        return _ALLOWED[module, name]


def read_metadata(directory: Path) -> Metadata:
    """Read what a checkpoint says about its tensors; it may come from anyone.

    Raises:
        FlexOlmoError: there is none, it is damaged, or it names anything but records of tensors.
    """
    path = directory / METADATA_FILE
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise FlexOlmoError(f"{directory} has no {METADATA_FILE}: expected a complete Megatron checkpoint "
                            "(torch_dist)") from None
    except _Refused as error:
        raise FlexOlmoError(f"{path} {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise FlexOlmoError(f"{path} is truncated or damaged: {type(error).__name__} {error}") from error
    if not (isinstance(metadata, Metadata) and isinstance(metadata.storage_data, dict)
            and isinstance(metadata.state_dict_metadata, dict) and _well_formed(metadata.state_dict_metadata)):
        raise FlexOlmoError(f"{path} is not the metadata of a torch_dist checkpoint")
    return metadata


def _well_formed(tensors: dict) -> bool:
    return all(isinstance(key, str) and isinstance(getattr(value, "size", torch.Size()), torch.Size)
               for key, value in tensors.items())
