"""How each kind of run begins: its model is built and filled, and what does not train is frozen."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.config.layout import ModelKind
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.domain.publish import OwnerRouter, owner_router
from flexolmo_megatron.domain.vector import load_vector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import BackgroundDigest, model_digest
from flexolmo_megatron.model.builder import build_model
from flexolmo_megatron.model.config import transformer_config
from flexolmo_megatron.model.engine import engine_settings, prepare_engine
from flexolmo_megatron.model.mean_drift import MeanDrift
from flexolmo_megatron.model.weights import init_expert_from_anchor, load_anchor, load_weights
from flexolmo_megatron.runtime.ranks import on_first_rank, together
from flexolmo_megatron.runtime.setup import local_device
from flexolmo_megatron.training.freezing import freeze_all_but_router, freeze_anchor
from flexolmo_megatron.training.router_run import active_experts, switch_off
from flexolmo_megatron.training.run_plan import Plan


@dataclass
class Start:
    """A model that is ready for its first step."""

    card: ModelCard
    """What the run's checkpoints will hold."""
    chunks: list[DistributedDataParallel]
    """This rank's model: one part, or one for each of its virtual pipeline stages."""


def start(planned: Plan, config: TrainConfig, resumes: bool) -> Start:
    """Build this rank's model for a run and fill it. Called by all ranks, with Megatron's process groups ready.

    What a single rank meets after the last communication is left to the caller to share (``together``).

    Args:
        planned: what is built.
        config: of the run.
        resumes: a checkpoint will be loaded: where that fills everything, nothing is filled now.

    Raises:
        FlexOlmoError: the domain vector is missing or was made for another anchor; a tensor cannot be read.
    """
    card = planned.card
    router = None if planned.anchor is None else name_anchor(planned, config)
    if card.kind != "pair":
        return Start(card, _filled(config, planned, resumes))
    chunks = together(
        lambda: _build(
            config,
            card,
            anchor_ffn_hidden_size=planned.anchor_ffn_hidden_size,
            domain_loss_coeff=config.expert.domain_loss_coeff,
            domain_margin=config.expert.domain_margin,
        )
    )
    fill_pair(chunks, planned.anchor, router)
    if config.expert.drift_coeff:
        _penalise_drift(chunks, router, config.expert.drift_coeff)
    return Start(card, wrap(config, chunks))


def _penalise_drift(chunks: list[GPTModel], router: OwnerRouter, coefficient: float) -> None:
    """Give a pair's routers the penalty; that of the first layer, below which no expert is, reports it all the same."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.mlp.router.drift = MeanDrift(*router.moments_of(layer.layer_number - 1), coefficient)


def name_anchor(planned: Plan, config: TrainConfig) -> OwnerRouter:
    """Write into an expert's card which anchor it is for and how its router row was made. Called by all ranks.

    Args:
        planned: of an expert run.
        config: of it ``anchor``, ``expert`` and ``seed`` are used.

    Returns:
        The owner's first router.

    Raises:
        FlexOlmoError: the domain vector was made for another anchor.
    """
    # By rank 0: another node may lack the file of the vector.
    planned.card.anchor_digest, router, made = on_first_rank(lambda: _first_router(config, planned.anchor))
    if planned.card.kind == "pair":
        planned.card.experts[1].router = made
    return router


@torch.no_grad()
def fill_pair(chunks: list[GPTModel], anchor: LazyModel, router: OwnerRouter) -> None:
    """Put the anchor into both halves of a pair model and the owner's into its routers; freeze what is the anchor's.

    Args:
        chunks: this rank's part, all of its virtual pipeline stages.
        anchor: the published anchor.
        router: from ``name_anchor``.
    """
    load_anchor(chunks, anchor)
    init_expert_from_anchor(chunks, anchor)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            row, bias = router.of(layer.layer_number - 1)
            layer.mlp.router.row.copy_(row)
            if layer.mlp.router.bias is not None:
                layer.mlp.router.bias.copy_(bias)
        freeze_anchor(chunk)


def fill(chunks: list[GPTModel], planned: Plan, config: TrainConfig) -> None:
    """Give another trainer's new model the weights that a run starts from, and freeze what does not train.

    Called by all ranks. The card of an owner's run names its anchor then, that of router tuning its merged model.

    Args:
        chunks: this rank's part, all of its virtual pipeline stages.
        planned: what was built.
        config: see ``name_anchor``.

    Raises:
        FlexOlmoError: the domain vector was made for another anchor; a tensor cannot be read.
    """
    router = None if planned.anchor is None else name_anchor(planned, config)
    if planned.card.kind == "pair":
        fill_pair(chunks, planned.anchor, router)
    else:
        load_weights(chunks, planned.source)
    if planned.card.kind == "router":
        planned.card.merged_digest = on_first_rank(lambda: model_digest(planned.source))
        for chunk in chunks:
            freeze_all_but_router(chunk)


def _filled(config: TrainConfig, planned: Plan, resumes: bool) -> list[DistributedDataParallel]:
    """Any model but a pair; a checkpoint of one has all of it, but of router tuning."""
    rows = planned.card.row_sets[0] if planned.card.kind == "router" else None
    top_k = {} if rows is None else {"moe_router_topk": active_experts(planned.built.model, rows)}
    chunks = together(lambda: _build(config, planned.built, **top_k))
    if rows is not None or not resumes:
        load_weights(chunks, planned.source)
    if rows is not None:
        for chunk in chunks:
            freeze_all_but_router(chunk)
            switch_off(chunk, planned.source.card.expert_names, rows)
    return wrap(config, chunks)


def _digests(anchor: LazyModel, dense: bool) -> tuple[str, str | None]:
    """The digest of the anchor, and where ``dense`` is true in the same go that without the router row."""
    if not dense:
        return model_digest(anchor), None
    background = BackgroundDigest(as_dense(anchor))
    try:
        return model_digest(anchor), background.result()
    finally:
        background.stop()


def _first_router(config: TrainConfig, anchor: LazyModel) -> tuple[str, OwnerRouter, dict]:
    """The anchor's digest, the owner's first router, and how it was made."""
    size = anchor.card.model
    if config.expert.random_row:
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(size.num_layers, size.hidden_size, generator=generator)
        # As long as the domain vectors they stand in for.
        rows = rows / rows.norm(dim=-1, keepdim=True)
        router = OwnerRouter(rows, torch.zeros(len(rows)))
        return _digests(anchor, dense=False)[0], router, {"embedder": "random", "documents": 0}
    vector = load_vector(config.expert.domain_vector)
    vector.check_fits(size.num_layers, size.hidden_size, config.expert.domain_vector)
    if vector.biases is not None and not config.expert.bias:
        raise FlexOlmoError(
            f"{config.expert.domain_vector} holds discriminants, which say nothing without their biases: expected "
            "expert.bias = true, or a vector from `flexolmo embed` without --public"
        )
    if vector.moments is None and config.expert.drift_coeff:
        raise FlexOlmoError(
            f"expert.drift_coeff = {config.expert.drift_coeff}: {config.expert.domain_vector} does not hold the mean "
            "hidden state of its documents; expected a file that `flexolmo embed --public` of this version wrote, or 0"
        )
    digest, dense_digest = _digests(anchor, dense=True)
    vector.check_made_with(dense_digest, config.expert.domain_vector, config.anchor)
    return digest, owner_router(vector, anchor), vector.record()


def run_settings(config: TrainConfig, kind: ModelKind) -> dict[str, Any]:
    """Return the arguments of ``transformer_config`` that a run's options give; also for other trainers.

    Args:
        config: of the run.
        kind: of the model that computes.
    """
    parallel = config.parallel
    settings = dict(
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence,
    )
    if kind != "dense":
        settings |= dict(
            moe_z_loss_coeff=config.moe_z_loss_coeff or None,
            moe_token_dispatcher_type=parallel.moe_token_dispatcher_type,
        )
    return settings


def _build(config: TrainConfig, card: ModelCard, **options: float | int | None) -> list[GPTModel]:
    """This rank's part of the model, without weights: one module for each of its virtual pipeline stages."""
    megatron_config = transformer_config(
        card.model,
        card.kind,
        # Everything is loaded, and the loading functions check that nothing is left out. Not perform_initialization:
        # without it Megatron does not mark which parameters are split, and counts them wrongly in gradient norms.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        **run_settings(config, card.kind),
        **engine_settings(card.kind, config.fp8.recipe),
        **options,
    )
    virtual = megatron_config.virtual_pipeline_model_parallel_size
    return [
        build_model(
            card.model,
            card.kind,
            megatron_config,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
        ).to(local_device())
        for stage in ([None] if virtual is None else range(virtual))
    ]


def _leave(weight: torch.Tensor) -> None:
    """Megatron's initialisation of a weight that is about to be loaded."""


def wrap(config: TrainConfig, chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.optimizer.use_distributed_optimizer
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, Float16Module(chunk.config, chunk) if config.bf16 else chunk)
        for chunk in chunks
    ]
    for chunk in wrapped:
        prepare_engine(chunk, config.fp8.recipe, config.fp8.drop_frozen)
    return wrapped
