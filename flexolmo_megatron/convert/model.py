"""Opening and saving a model of any file layout, and choosing some of its experts."""

import math
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from flexolmo_megatron.config.card import CARD_FILE, PUBLIC, TUNED_MODEL
from flexolmo_megatron.convert.huggingface import CONFIG_FILE, DEFAULT_SHARD_BYTES, open_huggingface, save_huggingface
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.megatron import open_megatron
from flexolmo_megatron.convert.megatron_writer import save_megatron
from flexolmo_megatron.convert.rows import Choice, is_row, leave_out
from flexolmo_megatron.convert.torch_metadata import METADATA_FILE
from flexolmo_megatron.errors import FlexOlmoError, nearest

CHECKPOINTS = "checkpoints"
"""Folder of a training run that holds one Megatron checkpoint per saved step, ``step_00000100`` and so on."""

_EXPECTED = ("expected a Hugging Face directory (config.json), a Megatron checkpoint (.metadata and flexolmo.json) or "
             "a training run (checkpoints/step_* or iter_*)")
_CARDS = "python -m flexolmo_megatron.integrations.megatron_lm cards"


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a training run, oldest first.

    Runs of this package have them in ``checkpoints/step_*``, launches through Megatron-LM in ``iter_*``. A half-written
    one has another name, or no card.
    """
    steps = [path for path in [*(directory / CHECKPOINTS).glob("step_*"), *directory.glob("iter_*")]
             if path.name.rpartition("_")[2].isdecimal() and _is_megatron(path)]
    return sorted(steps, key=lambda path: int(path.name.rpartition("_")[2]))


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint of a training run, or None; see ``checkpoints``."""
    return next(reversed(checkpoints(directory)), None)


def _is_megatron(directory: Path) -> bool:
    return (directory / METADATA_FILE).exists() and (directory / CARD_FILE).exists()


def open_model(path: str | os.PathLike) -> LazyModel:
    """Open a Hugging Face directory, a Megatron checkpoint, or the newest complete checkpoint of a training run.

    It may come from anyone: nothing in it is run.

    Raises:
        FlexOlmoError: ``path`` is none of these, or what it holds is missing something or is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise FlexOlmoError(f"{path} {'is a file' if path.exists() else 'does not exist'}: {_EXPECTED}")
    if (path / CONFIG_FILE).exists():
        return open_huggingface(path)
    if (path / CARD_FILE).exists():
        return _whole(open_megatron(path), path)
    if (path / TUNED_MODEL / CARD_FILE).exists():
        return open_megatron(path / TUNED_MODEL)
    if (newest := newest_checkpoint(path)) is not None:
        return _whole(open_megatron(newest), newest)
    if (path / CHECKPOINTS).is_dir():
        raise FlexOlmoError(f"{path / CHECKPOINTS} has no complete checkpoint: expected a folder step_* in it")
    if (path / METADATA_FILE).exists():
        raise FlexOlmoError(f"{path} has no {CARD_FILE}: expected it in a Megatron checkpoint of this package; after a "
                            f"run in Megatron-LM or Megatron-Bridge, call: {_CARDS} {path.parent}")
    if any(path.glob(f"iter_*/{METADATA_FILE}")):
        raise FlexOlmoError(f"{path} holds checkpoints without {CARD_FILE}; after a run in Megatron-LM or "
                            f"Megatron-Bridge, call: {_CARDS} {path}")
    if (path / "manifest.json").exists():
        raise FlexOlmoError(f"{path} is an expert package, not a model: {_EXPECTED}")
    raise FlexOlmoError(f"{path} holds no model: {_EXPECTED}")


def _whole(model: LazyModel, path: Path) -> LazyModel:
    if model.card.kind == "router":
        raise FlexOlmoError(f"{path} holds router rows alone: the tuned model is in the folder {TUNED_MODEL!r} of its "
                            "run once that has ended")
    return model


def save_model(model: LazyModel, path: str | os.PathLike, format: Literal["hf", "megatron"], drop_bias: bool = False,
               max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Write ``model`` into the new directory ``path``, which appears whole or not at all.

    Args:
        model: what to write; one tensor is in memory at a time.
        path: must not exist or be empty.
        format: "hf" for a Hugging Face directory, "megatron" for a Megatron checkpoint.
        drop_bias: for "hf" only: leave out a learned router bias.
        max_shard_bytes: for "hf" only: size of one weight file.

    Raises:
        FlexOlmoError: the format cannot hold the model, or ``path`` cannot be written.
    """
    if format == "hf":
        save_huggingface(model, path, drop_bias, max_shard_bytes)
    elif format == "megatron":
        save_megatron(model, path)
    else:
        raise FlexOlmoError(f"format {format!r}: expected hf or megatron")


def _select_rows(tensor: LazyTensor, rows: list[int]) -> LazyTensor:
    return LazyTensor(tensor.dtype, (len(rows), *tensor.shape[1:]),
                      lambda: tensor.read().index_select(0, torch.tensor(rows)))


def select_experts(model: LazyModel, names: Iterable[str], rows: Choice = "strict") -> LazyModel:
    """Return the model with only some of its experts, in the model's order; nothing is read.

    The public expert is always kept. top_k becomes at most the number of experts that are left.

    Args:
        model: of kind moe.
        names: experts to keep.
        rows: of a model whose router was tuned: see ``rows.choose``. Other sets that an expert has shaped go with it.

    Raises:
        FlexOlmoError: the model has no experts to choose from, or a name is unknown.
    """
    card = model.card
    if card.kind != "moe":
        raise FlexOlmoError(f"experts can be chosen only from a moe model, this one is {card.kind}")
    wanted = set(names) | {PUBLIC}
    check_names(wanted, card.expert_names)
    model = leave_out(model, set(card.expert_names) - wanted, rows)
    kept = [number for number, name in enumerate(card.expert_names) if name in wanted]
    config = replace(card.model, num_experts=len(kept), top_k=min(card.model.top_k, len(kept)))
    if len(kept) == 1:
        config.router_window = 1  # of one expert's logits nothing depends on it
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in model.tensors.items():
        before, found, after = name.partition(".mlp.experts.")
        if found:
            number, _, rest = after.partition(".")
            if int(number) in kept:
                tensors[f"{before}{found}{kept.index(int(number))}.{rest}"] = tensor
        else:
            tensors[name] = _select_rows(tensor, kept) if is_row(name) else tensor
    other_rows = {name: {key: _select_rows(tensor, kept) for key, tensor in others.items()}
                  for name, others in model.other_rows.items()}
    experts = [card.experts[number] for number in kept]
    return LazyModel(replace(model.card, model=config, experts=experts), tensors, other_rows)


def exclude_experts(model: LazyModel, names: Iterable[str], rows: Choice = "strict") -> LazyModel:
    """Return the model without the named experts; see ``select_experts``.

    Raises:
        FlexOlmoError: also if the public expert is named, which no model can do without.
    """
    names = list(names)
    # A model of another kind has no experts to leave out, whatever their names: select_experts says so.
    known = model.card.expert_names if model.card.kind == "moe" else [PUBLIC, *names]
    return select_experts(model, others(names, known), rows)


def others(names: Collection[str], known: list[str]) -> list[str]:
    """Return the experts of a model that are left without the named ones.

    Raises:
        FlexOlmoError: an unknown name, or the public expert, which no model can do without.
    """
    check_names(names, known)
    if PUBLIC in names:
        raise FlexOlmoError(f"expert {PUBLIC!r} cannot be excluded: it is the anchor that all others were trained with")
    return [name for name in known if name not in names]


def check_names(names: Iterable[str], known: list[str]) -> None:
    """Check expert names against those of a model.

    Raises:
        FlexOlmoError: a name is unknown; lists the known ones.
    """
    for name in sorted(names):
        if name not in known:
            choice = f"expected one of {', '.join(known)}" if known else "this model has none"
            raise FlexOlmoError(f"unknown expert {name!r}{nearest(name, known)}: {choice}")


def total_bytes(model: LazyModel) -> int:
    """Return the size of all tensors, in bytes."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in model.tensors.values())


def watch(model: LazyModel, on_read: Callable[[int], object]) -> LazyModel:
    """Return the model with ``on_read(bytes)`` called after each tensor that is read: for progress bars."""
    def read(tensor: LazyTensor) -> torch.Tensor:
        result = tensor.read()
        on_read(result.nbytes)
        return result

    return replace(model, tensors={name: replace(tensor, read=partial(read, tensor))
                                   for name, tensor in model.tensors.items()})
