"""A temperature of the router: all rows and biases of a merged model divided by one number, chosen on public text.

Owners' rows never met before the merge, and nothing fixes how decided the router is with all of them. The number with
the fewest bits per byte on public documents is kept. It has seen the experts' weights, so that each owner's opt-out has
a temperature of its own, found without that owner's expert.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from flexolmo_megatron.config.card import PUBLIC, TUNED, WITHOUT, RowSet
from flexolmo_megatron.convert.lazy import LazyTensor
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.row_sets import write_row_sets
from flexolmo_megatron.convert.rows import is_row
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.perplexity import evaluate_documents
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.files import check_free
from flexolmo_megatron.inference.access import routers_of, using_rows
from flexolmo_megatron.inference.model import Model, load_model


@dataclass(frozen=True)
class Calibration:
    """What was found for one set of experts."""

    name: str
    """Of the set of rows."""
    owners: list[str]
    """Whose experts took part."""
    bits_per_byte: dict[float, float]
    """By temperature, on the public documents."""

    @property
    def temperature(self) -> float:
        return min(self.bits_per_byte, key=lambda temperature: self.bits_per_byte[temperature])


def calibrate(path: str | Path, texts: Sequence[str], out: str | Path, temperatures: Sequence[float], *,
              progress: Callable[[int], None] | None = None) -> list[Calibration]:
    """Find a merged model's temperatures, with all experts and without each owner's, and write the model with them;
    reports each number on standard error as it comes.

    Args:
        path: merged, its router not tuned.
        texts: public documents.
        out: a new directory, for a Megatron checkpoint that keeps the untuned rows.
        temperatures: to try; below 1 the router becomes more decided.
        progress: called now and then with a number of tokens; all in all each is counted once for every temperature
            and set of experts.

    Raises:
        FlexOlmoError: no merged model, a router that was tuned already, an impossible temperature, no documents, or
            ``out`` exists or cannot be written.
    """
    if not temperatures or not all(0 < value < float("inf") for value in temperatures):
        raise FlexOlmoError(f"temperatures = {list(temperatures)}: expected numbers above 0")
    check_free(out)
    merged = open_model(path)
    card = merged.card
    if card.kind != "moe" or card.model.num_experts < 2 or card.row_sets:
        raise FlexOlmoError(f"{path} is a {card.kind} model with {card.model.num_experts} experts"
                            f"{' and a tuned router' * bool(card.row_sets)}: expected a merged model with an owner's "
                            "expert, as it was merged")
    digest = model_digest(merged)
    owners = card.expert_names[1:]
    without = {WITHOUT + left: [name for name in owners if name != left] for left in owners if len(owners) > 1}
    model = load_model(path)
    found = [_find(model, name, names, texts, temperatures, progress)
             for name, names in {TUNED: owners, **without}.items()]
    write_row_sets(
        merged, digest,
        [RowSet(one.name, one.owners, training={"temperature": one.temperature}) for one in found],
        [{name: _divided(tensor, one.temperature) for name, tensor in merged.tensors.items() if is_row(name)}
         for one in found],
        Path(out))
    return found


def _find(model: Model, name: str, owners: list[str], texts: Sequence[str], temperatures: Sequence[float],
          progress: Callable[[int], None] | None) -> Calibration:
    routers = routers_of(model.module)
    bits = {}
    for temperature in temperatures:
        rows = [(router.weight.data / temperature, None if router.bias is None else router.bias.data / temperature)
                for router in routers]
        with using_rows(model.module, rows):
            bits[temperature] = evaluate_documents(model, texts, experts=[PUBLIC, *owners],
                                                   progress=progress).bits_per_byte
        tqdm.write(f"rows {name}, temperature {temperature:g}: {bits[temperature]:.4f} bits per byte", file=sys.stderr)
    return Calibration(name, owners, bits)


def _divided(tensor: LazyTensor, temperature: float) -> LazyTensor:
    return LazyTensor(torch.float32, tensor.shape, lambda: tensor.read().float() / temperature)
