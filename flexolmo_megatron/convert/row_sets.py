"""Writing a merged model with further sets of router rows (``convert/rows.py``) beside its own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flexolmo_megatron.config.card import UNTUNED, RowSet
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.megatron_writer import write_megatron
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.rows import is_row, untuned
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.files import atomic_directory


def write_row_sets(merged: LazyModel, expected: str, sets: Sequence[RowSet],
                   rows: Sequence[Mapping[str, LazyTensor]], path: Path) -> None:
    """Write a merged model whose own rows are the first set of ``rows``, the others and the untuned ones beside them.

    Args:
        merged: the untuned model.
        expected: its digest.
        sets: what each set of rows depends on.
        rows: by canonical name, the rows and biases of each set; of any precision, written in the model's.
        path: a new directory.

    Raises:
        FlexOlmoError: a tensor cannot be read, or the model cannot be written.
        RuntimeError: what was written differs in more than rows: a defect of this package, or ``merged`` has changed
            on disk since its digest was taken.
    """
    before = {name: tensor for name, tensor in merged.tensors.items() if is_row(name)}
    first, *others = ({name: _as(tensor, before[name].dtype) for name, tensor in tensors.items()} for tensors in rows)
    named = {row_set.name: tensors for row_set, tensors in zip(sets[1:], others, strict=True)}
    model = LazyModel(replace(merged.card, row_sets=[*sets, RowSet(UNTUNED)]), merged.tensors | first,
                      {**named, UNTUNED: before})
    with atomic_directory(path) as staging:
        write_megatron(model, staging)
        if (digest := model_digest(untuned(open_model(staging)))) != expected:
            raise RuntimeError(f"the model with its untuned rows has the digest {digest}: expected {expected}")


def _as(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(dtype, tensor.shape, lambda: tensor.read().to(dtype))
