"""How each kind of run begins: which model is built and where its weights come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from flexolmo_megatron.config.card import (
    PUBLIC,
    ExpertRecord,
    ModelCard,
    check_expert_name,
    check_published,
    numbered_experts,
)
from flexolmo_megatron.config.layout import check_layout, data_parallel_size
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.convert.initial import random_model
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.variants import as_dense, upcycle
from flexolmo_megatron.domain.vector import load_vector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import BackgroundDigest, model_digest
from flexolmo_megatron.model.builder import build_model
from flexolmo_megatron.model.config import transformer_config
from flexolmo_megatron.model.engine import engine_settings, prepare_engine
from flexolmo_megatron.model.fp8 import check_recipe, check_sizes, this_chip
from flexolmo_megatron.model.spec import engine_is_default
from flexolmo_megatron.model.weights import init_expert_from_anchor, load_anchor, load_weights
from flexolmo_megatron.runtime.ranks import on_first_rank, together
from flexolmo_megatron.runtime.setup import local_device
from flexolmo_megatron.training.dataset_info import common_tokenizer
from flexolmo_megatron.training.datasets import parse_blend
from flexolmo_megatron.training.freezing import freeze_all_but_router, freeze_anchor
from flexolmo_megatron.training.router_run import plan_router, switch_off
from flexolmo_megatron.training.run_plan import Plan

Mode = Literal["anchor", "expert", "dense", "moe", "router"]


@dataclass
class Start:
    """A model that is ready for its first step."""

    card: ModelCard
    """What the run's checkpoints will hold."""
    chunks: list[DistributedDataParallel]
    """This rank's model: one part, or one for each of its virtual pipeline stages."""


def plan(mode: Mode, config: TrainConfig, world_size: int) -> Plan:
    """Open what a run starts from and check that the run can work, without torch.distributed.

    Args:
        mode: kind of run.
        config: all of its options.
        world_size: number of processes.

    Raises:
        FlexOlmoError: the anchor is missing, of the wrong kind, or does not fit the configuration; or the layout cannot
            work. On every rank alike.
    """
    data_parallel = data_parallel_size(config.parallel, world_size)
    config.validate(data_parallel)
    if mode != "router" and (config.merged or config.data.proxies or config.leave_one_out):
        raise FlexOlmoError(
            f"merged, data.proxies and leave_one_out are options of `train router`: expected none of them for "
            f"`train {mode}`"
        )
    planners = {"expert": plan_expert, "router": plan_router}
    planned = planners[mode](config) if mode in planners else _plan_other(mode, config)
    if config.data.seq_length > planned.card.model.max_position_embeddings:
        raise FlexOlmoError(
            f"data.seq_length = {config.data.seq_length}: expected at most model.max_position_embeddings = "
            f"{planned.card.model.max_position_embeddings}"
        )
    check_layout(
        planned.built.model,
        planned.built.kind,
        config.parallel,
        world_size=world_size,
        seq_length=config.data.seq_length,
        microbatches=config.global_batch_size // (config.micro_batch_size * data_parallel),
        anchor_ffn_hidden_size=planned.anchor_ffn_hidden_size,
    )
    if config.fp8.recipe is not None:
        _check_fp8(config, planned)
    return planned


def _check_fp8(config: TrainConfig, planned: Plan) -> None:
    check_recipe(config.fp8.recipe, this_chip())
    parallel = config.parallel
    check_sizes(
        config.fp8.recipe,
        planned.card.model,
        config.micro_batch_size * config.data.seq_length,
        parallel.tensor,
        planned.anchor_ffn_hidden_size or 0,
        ffn_parallel=parallel.expert_tensor,
        token_parallel=parallel.context * (parallel.tensor if parallel.sequence else 1),
    )


def _plan_other(mode: Mode, config: TrainConfig) -> Plan:
    if mode == "anchor" and config.anchor is not None:
        raise FlexOlmoError(
            f"anchor = {config.anchor}: an anchor starts from random weights; to continue one, use `train dense`"
        )
    source = None if config.anchor is None else open_model(config.anchor)
    if mode == "moe":
        source = _mixture(config, source)
        card = ModelCard("moe", source.card.model, source.card.experts, tokenizer=source.card.tokenizer)
    elif source is None:
        card = ModelCard("dense", config.model.dense())
        source = random_model(card, config.seed)
    else:
        source = as_dense(source)
        card = ModelCard("dense", source.card.model, tokenizer=source.card.tokenizer)
    if config.anchor is None:  # a new model speaks as its data does
        prefixes = parse_blend(config.data.train, "data.train")[0]
        card.tokenizer = common_tokenizer(prefixes, card.model.vocab_size) or card.tokenizer
    return Plan(card, source)


def _mixture(config: TrainConfig, source: LazyModel | None) -> LazyModel:
    """What an unrestricted MoE starts from: a mixture as it is, a dense model's FFN in every expert, or nothing."""
    if source is not None and source.card.model.num_experts > 1:
        return source
    model = config.model
    if model.num_experts < 2:
        raise FlexOlmoError(f"model.num_experts = {model.num_experts}: expected 2 or more for `train moe`")
    if source is not None:
        return upcycle(as_dense(source), model.num_experts, model.top_k, config.seed, router_bias=model.router_bias)
    return random_model(ModelCard("moe", model, numbered_experts(model.num_experts)), config.seed)


def plan_expert(config: TrainConfig) -> Plan:
    """What an owner's run starts from: of ``config``, ``anchor`` and ``expert`` are used.

    Raises:
        FlexOlmoError: the anchor is missing or of the wrong kind, or the expert does not fit it.
    """
    if config.anchor is None:
        raise FlexOlmoError("anchor has no value: an expert needs the published anchor; set anchor=PATH")
    check_expert_name(config.expert.name)
    anchor = open_model(config.anchor)
    check_published(anchor.card, f"anchor = {config.anchor}")
    if not config.expert.random_row and config.expert.domain_vector is None:
        raise FlexOlmoError(
            "expert.domain_vector has no value: expected a file from `flexolmo embed`, or expert.random_row=true"
        )
    pair = anchor.card.model.pair(config.expert.ffn_hidden_size, config.expert.bias)
    if not config.expert.coordination:
        if config.expert.ffn_hidden_size is not None:
            raise FlexOlmoError("expert.ffn_hidden_size: without coordination the expert has the anchor's width")
        # The ablation: all weights of a dense copy train; packing takes its FFNs.
        dense = as_dense(anchor)
        card = ModelCard("dense", dense.card.model, tokenizer=anchor.card.tokenizer, anchor_dtype=_dtype_name(anchor))
        return Plan(card, dense, anchor)
    card = ModelCard(
        "pair",
        pair,
        [ExpertRecord(PUBLIC), ExpertRecord(config.expert.name)],
        tokenizer=anchor.card.tokenizer,
        anchor_path=str(Path(config.anchor).resolve()),
        anchor_dtype=_dtype_name(anchor),
    )
    return Plan(card, anchor, anchor)


def start(planned: Plan, config: TrainConfig) -> Start:
    """Build this rank's model for a run and fill it. Called by all ranks, with Megatron's process groups ready.

    What a single rank meets after the last communication is left to the caller to share (``together``).

    Raises:
        FlexOlmoError: the domain vector is missing or was made for another anchor; a tensor cannot be read.
    """
    card = planned.card
    if planned.anchor is None:
        return Start(card, _filled(config, planned))
    rows = name_anchor(planned, config)
    if card.kind == "dense":
        return Start(card, _filled(config, planned))
    chunks = together(
        lambda: _build(
            config,
            card,
            anchor_ffn_hidden_size=planned.anchor_ffn_hidden_size,
            domain_loss_coeff=config.expert.domain_loss_coeff,
            domain_margin=config.expert.domain_margin,
        )
    )
    fill_pair(chunks, planned.anchor, rows)
    return Start(card, wrap(config, chunks))


def name_anchor(planned: Plan, config: TrainConfig) -> torch.Tensor:
    """Write into an expert's card which anchor it is for and how its router row was made. Called by all ranks.

    Args:
        planned: of an expert run.
        config: of it ``anchor``, ``expert`` and ``seed`` are used.

    Returns:
        The owner's first router rows `[L or 1, h]`, fp32.

    Raises:
        FlexOlmoError: the domain vector was made for another anchor.
    """
    # By rank 0: another node may lack the file of the vector.
    planned.card.anchor_digest, rows, made = on_first_rank(lambda: _first_rows(config, planned.anchor))
    if planned.card.kind == "pair":
        planned.card.experts[1].router = made
    return rows


@torch.no_grad()
def fill_pair(chunks: list[GPTModel], anchor: LazyModel, rows: torch.Tensor) -> None:
    """Put the anchor into both halves of a pair model and the rows into its routers; freeze what is the anchor's.

    Args:
        chunks: this rank's part, all of its virtual pipeline stages.
        anchor: the published anchor.
        rows: from ``name_anchor``.
    """
    load_anchor(chunks, anchor)
    init_expert_from_anchor(chunks, anchor)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.mlp.router.row.copy_(rows[layer.layer_number - 1 if len(rows) > 1 else 0])
        freeze_anchor(chunk)


def _filled(config: TrainConfig, planned: Plan) -> list[DistributedDataParallel]:
    chunks = together(lambda: _build(config, planned.built))
    load_weights(chunks, planned.source)
    if planned.card.kind == "router":
        for chunk in chunks:
            freeze_all_but_router(chunk)
            switch_off(chunk, planned.source.card.expert_names, planned.card.row_sets[0])
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


def _dtype_name(model: LazyModel) -> str:
    return str(model.tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")


def _first_rows(config: TrainConfig, anchor: LazyModel) -> tuple[str, torch.Tensor, dict]:
    """The anchor's digest, the owner's first router rows `[L or 1, h]` in fp32, and how they were made."""
    size = anchor.card.model
    if config.expert.random_row:
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(size.num_layers, size.hidden_size, generator=generator)
        # As long as the domain vectors they stand in for.
        rows = rows / rows.norm(dim=-1, keepdim=True)
        return _digests(anchor, dense=False)[0], rows, {"embedder": "random", "documents": 0}
    vector = load_vector(config.expert.domain_vector)
    vector.check_fits(size.num_layers, size.hidden_size, config.expert.domain_vector)
    digest, dense_digest = _digests(anchor, dense=True)
    if vector.dense_digest != dense_digest:
        raise FlexOlmoError(
            f"{config.expert.domain_vector} was made for another anchor (digest {vector.dense_digest[:12]}…): "
            f"expected one for {config.anchor} (digest {dense_digest[:12]}…)"
        )
    return digest, torch.from_numpy(vector.vectors), vector.record()


def _build(config: TrainConfig, card: ModelCard, **options: float | int | None) -> list[GPTModel]:
    """This rank's part of the model, without weights: one module for each of its virtual pipeline stages."""
    parallel = config.parallel
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    megatron_config = transformer_config(
        card.model,
        card.kind,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence,
        # Everything is loaded, and the loading functions check that nothing is left out. Not perform_initialization:
        # without it Megatron does not mark which parameters are split, and counts them wrongly in gradient norms.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        **(
            {}
            if card.kind == "dense"
            else {
                "moe_z_loss_coeff": config.moe_z_loss_coeff or None,
                "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
            }
        ),
        **(engine_settings(card.kind, config.fp8.recipe) if engine_is_default() else {}),
        **options,
    )
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
