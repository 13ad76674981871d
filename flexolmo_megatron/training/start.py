"""How each kind of run begins: which model is built and where its weights come from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, ModelCard
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.variants import as_dense, upcycle
from flexolmo_megatron.domain.publish import dense_digest
from flexolmo_megatron.domain.vector import load_vector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.exchange.manifest import check_expert_name
from flexolmo_megatron.model.builder import build_model
from flexolmo_megatron.model.config import transformer_config
from flexolmo_megatron.model.weights import init_expert_from_anchor, load_anchor, load_weights
from flexolmo_megatron.runtime.setup import local_device
from flexolmo_megatron.training.freezing import freeze_anchor

Mode = Literal["anchor", "expert", "dense", "moe"]
MODES: tuple[Mode, ...] = ("anchor", "expert", "dense", "moe")


@dataclass
class Start:
    """A model that is ready for its first step."""

    card: ModelCard
    """What the run's checkpoints will hold."""
    chunks: list[DistributedDataParallel]
    """This rank's model."""


def start(mode: Mode, config: TrainConfig) -> Start:
    """Build this rank's model for a run and fill it from the anchor, from another model, or at random.

    Raises:
        FlexOlmoError: the anchor is missing, of the wrong kind, or does not fit the configuration.
    """
    if mode == "anchor" and config.anchor is not None:
        raise FlexOlmoError(
            f"anchor = {config.anchor}: an anchor starts from random weights; to continue one, use `train dense`"
        )
    if mode == "expert":
        return _start_expert(config)
    source = None if config.anchor is None else open_model(config.anchor)
    if mode == "moe":
        source = _mixture(config, source)
        card = source.card if source else _new_mixture_card(config.model)
        card = ModelCard("moe", card.model, card.experts, tokenizer=card.tokenizer)
    else:
        source = None if source is None else as_dense(source)
        card = ModelCard("dense", source.card.model if source else replace(config.model, num_experts=0, top_k=0))
        if source:
            card.tokenizer = source.card.tokenizer
    _check_sequence(config, card.model)
    model = _build(config, card.model, "moe" if mode == "moe" else "dense")
    if source:
        load_weights(model, source)
    return Start(card, [_wrap(config, model)])


def _mixture(config: TrainConfig, source: LazyModel | None) -> LazyModel | None:
    """What an unrestricted MoE starts from: a mixture as it is, or the FFN of a dense model in every expert."""
    if source is None or source.card.model.num_experts > 1:
        return source
    if config.model.num_experts < 2:
        raise FlexOlmoError(f"model.num_experts = {config.model.num_experts}: expected 2 or more for `train moe`")
    return upcycle(as_dense(source), config.model.num_experts, config.model.top_k, config.seed)


def _new_mixture_card(model: ModelConfig) -> ModelCard:
    if model.num_experts < 2:
        raise FlexOlmoError(f"model.num_experts = {model.num_experts}: expected 2 or more for `train moe`")
    names = [PUBLIC, *(f"expert_{index}" for index in range(1, model.num_experts))]
    return ModelCard("moe", model, [ExpertRecord(name) for name in names])


def _start_expert(config: TrainConfig) -> Start:
    if config.anchor is None:
        raise FlexOlmoError("anchor has no value: an expert needs the published anchor; set anchor=PATH")
    check_expert_name(config.expert.name)
    anchor = open_model(config.anchor)
    if anchor.card.kind != "moe" or anchor.card.model.num_experts != 1:
        raise FlexOlmoError(
            f"anchor = {config.anchor} has no router row (kind {anchor.card.kind}, {anchor.card.model.num_experts} "
            f"experts): "
            "expected a published anchor, as `flexolmo embed --publish` writes it"
        )
    width = config.expert.ffn_hidden_size or anchor.card.model.ffn_hidden_size
    if not 1 <= width <= anchor.card.model.ffn_hidden_size:
        raise FlexOlmoError(
            f"expert.ffn_hidden_size = {width}: expected 1 to the anchor's {anchor.card.model.ffn_hidden_size}"
        )
    rows, made = _first_rows(config, anchor)
    model_config = replace(
        anchor.card.model, num_experts=2, top_k=2, ffn_hidden_size=width, router_bias=config.expert.bias
    )
    card = ModelCard(
        "pair",
        model_config,
        [ExpertRecord(PUBLIC), ExpertRecord(config.expert.name, router=made)],
        tokenizer=anchor.card.tokenizer,
        anchor_digest=model_digest(anchor),
        anchor_path=str(Path(config.anchor).resolve()),
        anchor_dtype=_dtype_name(anchor),
    )
    _check_sequence(config, card.model)
    if not config.expert.coordination:
        return _start_uncoordinated(config, anchor, card)
    model = _build(
        config,
        model_config,
        "pair",
        anchor_ffn_hidden_size=anchor.card.model.ffn_hidden_size,
        domain_loss_coeff=config.expert.domain_loss_coeff,
    )
    load_anchor(model, anchor)
    init_expert_from_anchor(model, anchor)
    for layer in model.decoder.layers:
        router = layer.mlp.router
        with torch.no_grad():
            router.row.copy_(rows[layer.layer_number - 1 if len(rows) > 1 else 0])
    freeze_anchor(model)
    return Start(card, [_wrap(config, model)])


def _dtype_name(model: LazyModel) -> str:
    return str(model.tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")


def _first_rows(config: TrainConfig, anchor: LazyModel) -> tuple[torch.Tensor, dict]:
    """The owner's first router rows `[L or 1, h]` in fp32 and how they were made."""
    size = anchor.card.model
    if config.expert.random_row:
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(size.num_layers, size.hidden_size, generator=generator)
        # As long as the domain vectors they stand in for.
        return rows / rows.norm(dim=-1, keepdim=True), {"embedder": "random", "documents": 0}
    if config.expert.domain_vector is None:
        raise FlexOlmoError(
            "expert.domain_vector has no value: expected a file from `flexolmo embed`, or expert.random_row=true"
        )
    vector = load_vector(config.expert.domain_vector)
    vector.check_fits(size.num_layers, size.hidden_size, config.expert.domain_vector)
    digest = dense_digest(anchor)
    if vector.dense_digest != digest:
        raise FlexOlmoError(
            f"{config.expert.domain_vector} was made for another anchor (digest {vector.dense_digest[:12]}…): "
            f"expected one for {config.anchor} (digest {digest[:12]}…)"
        )
    return torch.from_numpy(vector.vectors), vector.record()


def _start_uncoordinated(config: TrainConfig, anchor: LazyModel, card: ModelCard) -> Start:
    """The ablation without coordination: all weights of a dense copy train; packing takes its FFNs."""
    if config.expert.ffn_hidden_size is not None:
        raise FlexOlmoError("expert.ffn_hidden_size: without coordination the expert has the anchor's width")
    dense = as_dense(anchor)
    card = replace(card, kind="dense", model=dense.card.model, experts=[], anchor_path=None)
    model = _build(config, dense.card.model, "dense")
    load_weights(model, dense)
    return Start(card, [_wrap(config, model)])


def _check_sequence(config: TrainConfig, model: ModelConfig) -> None:
    if config.data.seq_length > model.max_position_embeddings:
        raise FlexOlmoError(
            f"data.seq_length = {config.data.seq_length}: expected at most model.max_position_embeddings = "
            f"{model.max_position_embeddings}"
        )


def _build(config: TrainConfig, model: ModelConfig, kind: str, **options: float) -> GPTModel:
    megatron_config = transformer_config(
        model,
        kind,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        expert_model_parallel_size=config.parallel.expert,
        sequence_parallel=config.parallel.sequence,
        **({} if kind == "dense" else {"moe_z_loss_coeff": config.moe_z_loss_coeff or None}),
        **options,
    )
    torch.manual_seed(config.seed)
    return build_model(
        model,
        kind,
        megatron_config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).to(local_device())


def _wrap(config: TrainConfig, model: GPTModel) -> DistributedDataParallel:
    module = Float16Module(model.config, model) if config.bf16 else model
    return DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.optimizer.use_distributed_optimizer
        ),
        module,
    )
