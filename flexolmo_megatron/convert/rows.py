"""Sets of router rows of one merged model: the untuned ones, and those that were tuned, with whom they depend on.

A row that was tuned has seen the other owners' proxies and, through the loss, the other owners' experts. So leaving out
an owner's expert is **strict** (nothing that was derived from the owner's data is left) only with a set of rows that
was tuned without both, or with the untuned ones; with any other set it is **expert-only**. The card names what each set
depends on (``RowSet``). One set is among the model's tensors, the others lie beside them in ``ROWS_FILE``, a
safetensors file with the names SET:TENSOR; its name has another ending, so that nothing takes it for a weight file.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from flexolmo_megatron.config.card import UNTUNED, ModelCard, RowSet
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.names import check_tensors, expected_tensors
from flexolmo_megatron.convert.safetensors_io import open_file, write_tensors
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.streaming import streaming_file

ROWS_FILE = "flexolmo.rows"

Choice = Literal["strict", "tuned", "untuned"]


def is_row(name: str) -> bool:
    """Whether a canonical tensor holds router rows or biases."""
    return ".mlp.gate." in name


def choose(row_sets: list[RowSet], excluded: Collection[str], choice: Choice = "strict") -> RowSet | None:
    """Return the set of rows to use; None for a model whose router was never tuned.

    Args:
        row_sets: of a card.
        excluded: experts that are left out.
        choice: strict: the first set that none of them has shaped; tuned: the model's own; untuned.

    Raises:
        FlexOlmoError: another choice.
    """
    if choice not in get_args(Choice):
        raise FlexOlmoError(f"rows = {choice!r}: expected one of {', '.join(get_args(Choice))}")
    if not row_sets:
        return None
    if choice == "tuned":
        return row_sets[0]
    return next(rows for rows in row_sets
                if (rows.name == UNTUNED if choice == "untuned" else not rows.depends_on(excluded)))


def describe_choice(rows: RowSet | None, excluded: Collection[str]) -> str:
    """Name the rows and, where experts are left out, the guarantee that holds; empty for a model never tuned."""
    if rows is None:
        return ""
    if not excluded:
        return rows.name
    return f"{rows.name} ({'expert-only' if rows.depends_on(excluded) else 'strict'})"


def use_rows(model: LazyModel, name: str) -> LazyModel:
    """Return the model with another of its sets among its tensors; the one that was there stays with it."""
    first = model.card.row_sets[0]
    if name == first.name:
        return model
    chosen = next(rows for rows in model.card.row_sets if rows.name == name)
    others = {first.name: {key: tensor for key, tensor in model.tensors.items() if is_row(key)}, **model.other_rows}
    tensors = model.tensors | others.pop(name)
    sets = [chosen, *(rows for rows in model.card.row_sets if rows is not chosen)]
    return LazyModel(replace(model.card, row_sets=sets), tensors, others)


def untuned(model: LazyModel) -> LazyModel:
    """Return the model as it was before its router was tuned."""
    if not model.card.row_sets:
        return model
    before = use_rows(model, UNTUNED)
    return LazyModel(replace(before.card, row_sets=[]), before.tensors)


def leave_out(model: LazyModel, excluded: Collection[str], choice: Choice = "strict") -> LazyModel:
    """Choose the rows of a model that is about to lose experts, and drop the other sets that these have shaped.

    Raises:
        FlexOlmoError: see ``choose``.
    """
    chosen = choose(model.card.row_sets, excluded, choice)
    if chosen is None:
        return model
    model = use_rows(model, chosen.name)
    kept = [rows for rows in model.card.row_sets if rows is chosen or not rows.depends_on(excluded)]
    if len(kept) == 1:  # the untuned ones: no tuning has left a trace
        return untuned(model)
    names = [rows.name for rows in kept[1:]]
    return LazyModel(replace(model.card, row_sets=kept), model.tensors, {name: model.other_rows[name]
                                                                        for name in names})


def without_bias(model: LazyModel) -> LazyModel:
    """Return the model without router biases, in all of its sets of rows."""
    def rest(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(".mlp.gate.bias")}

    config = replace(model.card.model, router_bias=False)
    return LazyModel(replace(model.card, model=config), rest(model.tensors),
                     {name: rest(rows) for name, rows in model.other_rows.items()})


def save_rows(model: LazyModel, directory: Path) -> None:
    """Write the sets that are not among the model's tensors into ``directory``; nothing where there are none."""
    if model.other_rows:
        with streaming_file(directory / ROWS_FILE) as file:
            write_tensors(file, {f"{name}:{key}": tensor for name, rows in model.other_rows.items()
                                 for key, tensor in rows.items()})


def open_rows(directory: Path, card: ModelCard) -> dict[str, dict[str, LazyTensor]]:
    """Open the sets that a card names beside the first one.

    Raises:
        FlexOlmoError: the file is missing or damaged, or a tensor is missing, unexpected or of the wrong shape or type.
    """
    if card.kind != "moe" or len(card.row_sets) < 2:
        return {}
    path = directory / ROWS_FILE
    tensors = open_file(path)
    shapes = expected_tensors(card.model, "router")
    sets = [rows.name for rows in card.row_sets[1:]]
    check_tensors(tensors, {f"{name}:{key}": shape for name in sets for key, shape in shapes.items()}, str(path))
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise FlexOlmoError(f"{path}: tensor {name} has dtype {str(tensor.dtype).removeprefix('torch.')}: expected "
                                "numbers with a fraction")
    return {name: {key: tensors[f"{name}:{key}"] for key in shapes} for name in sets}
