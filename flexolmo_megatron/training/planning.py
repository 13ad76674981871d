"""What each kind of run starts from, and whether it can work: known before any process group exists."""

from pathlib import Path
from typing import Literal

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
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.fp8 import check_recipe, check_sizes, this_chip
from flexolmo_megatron.training.dataset_info import common_tokenizer
from flexolmo_megatron.training.datasets import parse_blend
from flexolmo_megatron.training.router_run import plan_router
from flexolmo_megatron.training.run_plan import Plan

Mode = Literal["anchor", "expert", "dense", "moe", "router"]


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
    for name in ("anchor_kl_coeff", "drift_coeff"):
        if mode != "expert" and (coefficient := getattr(config.expert, name)):
            raise FlexOlmoError(
                f"expert.{name} = {coefficient} is an option of `train expert`: expected none for `train {mode}`"
            )
    planned = plan_start(mode, config)
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


def plan_start(mode: Mode, config: TrainConfig) -> Plan:
    """Open what a run starts from, for any launch of it.

    Args:
        mode: kind of run.
        config: of it ``anchor``, ``merged``, ``expert`` and the names of ``data.proxies`` are used, and of a run that
            starts from nothing ``model``, ``seed`` and ``data.train``.

    Raises:
        FlexOlmoError: that is missing or of the wrong kind, or the expert does not fit it.
    """
    planners = {"expert": plan_expert, "router": plan_router}
    return planners[mode](config) if mode in planners else _plan_other(mode, config)


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
        sequence_parallel=parallel.sequence,
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
        return upcycle(
            as_dense(source),
            model.num_experts,
            model.top_k,
            config.seed,
            router_bias=model.router_bias,
            router_window=model.router_window,
        )
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
    pair = anchor.card.model.pair(config.expert.ffn_hidden_size, config.expert.bias, config.expert.router_window)
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


def _dtype_name(model: LazyModel) -> str:
    return str(model.tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
