"""Models made of another model's tensors: the dense model within an anchor, and experts copied from its FFN."""

from dataclasses import replace
from typing import TYPE_CHECKING

from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, ModelCard, numbered_experts
from flexolmo_megatron.convert.initial import random_model
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.rows import is_row
from flexolmo_megatron.errors import FlexOlmoError

if TYPE_CHECKING:
    from flexolmo_megatron.domain.publish import OwnerRouter

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def as_dense(anchor: LazyModel) -> LazyModel:
    """Return the dense model of a published anchor (one expert) without its router row; a dense model as it is.

    Raises:
        FlexOlmoError: the model has several experts.
    """
    card = anchor.card
    if card.kind == "dense":
        return anchor
    if card.kind != "moe" or card.model.num_experts != 1:
        raise FlexOlmoError(
            f"expected a dense model or a published anchor, got one with the experts {card.expert_names}"
        )
    tensors = {
        name.replace(".mlp.experts.0.", ".mlp."): tensor
        for name, tensor in anchor.tensors.items()
        if not is_row(name)
    }
    return LazyModel(ModelCard(kind="dense", model=card.model.dense(), tokenizer=card.tokenizer), tensors)


def upcycle(
    dense: LazyModel, num_experts: int, top_k: int, seed: int, *, router_bias: bool = False, router_window: int = 1
) -> LazyModel:
    """Return a mixture whose experts all start as the dense model's FFN, with random router rows (unrestricted MoE).

    Router biases, where there are any, start at 0.
    """
    config = replace(
        dense.card.model,
        num_experts=num_experts,
        top_k=top_k,
        router_bias=router_bias,
        router_window=router_window,
    )
    card = ModelCard("moe", config, numbered_experts(num_experts), tokenizer=dense.card.tokenizer)
    router = random_model(replace(card, kind="router"), seed)
    tensors = {name: tensor for name, tensor in dense.tensors.items() if ".mlp." not in name} | router.tensors
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.mlp"
        for expert in range(num_experts):
            for projection in _PROJECTIONS:
                tensors[f"{prefix}.experts.{expert}.{projection}.weight"] = dense.tensors[
                    f"{prefix}.{projection}.weight"
                ]
    return LazyModel(card, tensors)


def as_pair(dense: LazyModel, router: "OwnerRouter", expert: ExpertRecord, router_window: int = 1) -> LazyModel:
    """Return what an owner without coordination hands over: the FFNs of their dense copy, with a given router.

    Args:
        dense: the owner's dense copy of the anchor.
        router: its rows and biases; without a bias other than 0, the result has none.
        expert: name and provenance.
        router_window: see ``ModelConfig``.
    """
    card = dense.card
    has_bias = bool(router.biases.any())
    tensors = {}
    for layer in range(card.model.num_layers):
        prefix = f"model.layers.{layer}.mlp"
        row_H, bias = router.of(layer)
        for projection in _PROJECTIONS:
            tensors[f"{prefix}.experts.1.{projection}.weight"] = dense.tensors[f"{prefix}.{projection}.weight"]
        dtype = tensors[f"{prefix}.experts.1.gate_proj.weight"].dtype
        for name, tensor in [("weight", row_H[None].to(dtype)), ("bias", bias[None])][: 1 + has_bias]:
            tensors[f"{prefix}.gate.{name}"] = LazyTensor(tensor.dtype, tuple(tensor.shape), tensor.clone)
    model = replace(card.model, num_experts=2, top_k=2, router_bias=has_bias, router_window=router_window)
    return LazyModel(replace(card, kind="pair", model=model, experts=[ExpertRecord(PUBLIC), expert]), tensors)
