"""Router tuning: which sets of rows a run tunes, one after the other, and the tuned model that it ends with.

Each set is a run of its own, with its own data, optimizer and checkpoints, so that nothing of an owner who is left out
of a set can reach it: not through the rows of earlier layers, and not through the norm that gradients are clipped by.
That is why the sets share no forward passes: even at the same rows, hidden states would differ from the first layer on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from flexolmo_megatron.config.card import PUBLIC, TUNED, TUNED_MODEL, UNTUNED, WITHOUT, ModelCard, RowSet
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.megatron import open_megatron
from flexolmo_megatron.convert.model import check_names, open_model
from flexolmo_megatron.convert.row_sets import write_row_sets
from flexolmo_megatron.convert.rows import untuned
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.runtime.ranks import on_first_rank
from flexolmo_megatron.runtime.setup import local_device
from flexolmo_megatron.training.checkpoint import STEP_FOLDER, step_folders
from flexolmo_megatron.training.run_plan import Plan

SETS_FOLDER = "without"
"""Folder of a run with one run in it for each owner who is left out of a set."""


def plan_router(config: TrainConfig) -> Plan:
    """What router tuning starts from: the merged model, with its untuned rows where it was tuned before.

    Raises:
        FlexOlmoError: there is no merged model, or no owner's proxies fit it.
    """
    if config.merged is None:
        raise FlexOlmoError("merged has no value: router tuning needs a merged model; set merged=PATH")
    for name, value in (("anchor", config.anchor), ("data.public", config.data.public)):
        if value:
            raise FlexOlmoError(f"{name} = {value}: expected no value for `train router`, which reads the model of "
                                "merged and the public data of data.train")
    source = untuned(open_model(config.merged))
    if source.card.kind != "moe" or source.card.model.num_experts < 2:
        raise FlexOlmoError(
            f"merged = {config.merged} is a {source.card.kind} model with {source.card.model.num_experts} experts: "
            f"expected a merged model, with the public expert and at least one owner's"
        )
    owners, proxies = source.card.expert_names[1:], config.data.proxies
    if not proxies:
        raise FlexOlmoError(
            "data.proxies is empty: expected proxies of at least one owner, as data.proxies.NAME=[PREFIX]"
        )
    try:
        check_names(proxies, owners)
    except FlexOlmoError as error:
        raise FlexOlmoError(f"data.proxies: {error}") from None
    card = replace(source.card, kind="router", row_sets=[RowSet(TUNED, owners, [n for n in owners if n in proxies])])
    return Plan(card, source)


def active_experts(model: ModelConfig, rows: RowSet) -> int:
    """How many experts a token gets while a set of rows is tuned: top-k, but no more than take part.

    The alltoall dispatcher's fused permutation makes room for exactly so many rows per token.
    """
    return min(model.top_k, 1 + len(rows.experts))


def switch_off(chunk: GPTModel, names: list[str], rows: RowSet) -> None:
    """Switch off the experts that take no part in tuning a set of rows: none of their weights reaches it."""
    allowed_E = torch.tensor([name == PUBLIC or name in rows.experts for name in names], device=local_device())
    if not allowed_E.all():
        for layer in chunk.decoder.layers:
            layer.mlp.router.allowed_BE = allowed_E[None]


@dataclass(frozen=True)
class RowSetRun:
    """The run that tunes one set of rows."""

    config: TrainConfig
    plan: Plan

    @property
    def steps(self) -> int:
        """How many its newest checkpoint has."""
        saved = step_folders(Path(self.config.out))
        return int(STEP_FOLDER.fullmatch(saved[-1].name)[1]) if saved else 0


def row_set_runs(config: TrainConfig, planned: Plan) -> list[RowSetRun]:
    """The runs of a whole tuning: with all experts, then, where asked for, without each. Called by all ranks.

    An owner without whom no proxies are left gets no set: without that owner the untuned rows are used.
    """
    planned.card.merged_digest = on_first_rank(lambda: model_digest(planned.source))
    runs = [RowSetRun(config, planned)]
    tuned = planned.card.row_sets[0]
    for left_out in tuned.experts if config.leave_one_out else ():
        proxies = {name: prefixes for name, prefixes in config.data.proxies.items() if name != left_out}
        if not proxies:
            continue
        rows = RowSet(
            WITHOUT + left_out,
            [name for name in tuned.experts if name != left_out],
            [name for name in tuned.proxies if name != left_out],
        )
        own = replace(
            config,
            out=str(Path(config.out, SETS_FOLDER, left_out)),
            data=replace(config.data, proxies=proxies),
            leave_one_out=False,
        )
        runs.append(RowSetRun(own, replace(planned, card=replace(planned.card, row_sets=[rows]))))
    on_first_rank(lambda: _check_tuned_model(Path(config.out, TUNED_MODEL), runs))
    return runs


def _check_tuned_model(path: Path, runs: list[RowSetRun]) -> None:
    """Refuse to tune sets that a finished model, which is never overwritten, would not get."""
    if not path.exists():
        return
    there = [rows.name for rows in ModelCard.load(path).row_sets]
    missing = [run.plan.card.row_sets[0].name for run in runs if run.plan.card.row_sets[0].name not in there]
    if missing:
        raise FlexOlmoError(
            f"{path} is written already, with the rows {', '.join(there)} and without {', '.join(missing)}: move it "
            f"away and repeat the command, which tunes what is missing and writes the model anew"
        )


def write_tuned_model(merged: LazyModel, expected: str, checkpoints: Sequence[Path], out: Path) -> str:
    """Write the merged model with its tuned rows into ``out``/model, its untuned rows beside them; rank 0 alone.

    Args:
        merged: the untuned model.
        expected: its digest.
        checkpoints: the last one of each set's run, the one with all experts first.
        out: folder of the run.

    Returns:
        A sentence on what was written and checked.

    Raises:
        FlexOlmoError, RuntimeError: see ``write_row_sets``; a checkpoint cannot be read.
    """
    path = out / TUNED_MODEL
    if path.exists():
        return f"{path} is there already"
    sets, rows = [], []
    for checkpoint in checkpoints:
        tuned = open_megatron(checkpoint)
        sets.append(replace(tuned.card.row_sets[0], training=tuned.card.training))
        rows.append(tuned.tensors)
    write_row_sets(merged, expected, sets, rows, path)
    names = ", ".join([*(row_set.name for row_set in sets), UNTUNED])
    return f"saved {path}: rows {names}; all but the tuned rows is bitwise that of the merged model, digest {expected}"
