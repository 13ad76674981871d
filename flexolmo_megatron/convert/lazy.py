"""A model as a table of tensors that are read one at a time: what conversion, digest, merge and export work on.

Neither Megatron nor a GPU is needed here, and no operation holds more than one tensor in memory.
Tensors carry the names of the Hugging Face layout (``convert/names.py``), whatever the files look like.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from flexolmo_megatron.config.card import ModelCard


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is on disk until ``read`` is called."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """Return the tensor, on the CPU, contiguous, with ``dtype`` and ``shape``; a new copy each time."""


@dataclass(frozen=True)
class LazyModel:
    """The tensors of one model by canonical name, and its card."""

    card: ModelCard
    tensors: dict[str, LazyTensor]
    other_rows: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    """Of a model with a tuned router: the row sets that are not among ``tensors``, by name (``convert/rows.py``)."""


def padded(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Extend with zeros to ``shape``.

    Of an expert's matrices this is exact: an inner unit whose gate, up and down weights are 0 adds silu(0) * 0 * 0 = 0.
    """
    if tensor.shape == shape:
        return tensor

    def read() -> torch.Tensor:
        result = torch.zeros(shape, dtype=tensor.dtype)
        result[tuple(slice(size) for size in tensor.shape)] = tensor.read()
        return result

    return LazyTensor(tensor.dtype, shape, read)
