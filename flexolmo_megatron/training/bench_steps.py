"""What the benchmarks share: the step of an owner's run, ours and stock Megatron's with the research code's method."""

from collections.abc import Callable
from dataclasses import replace

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, ModelCard
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.model.builder import block_spec
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig
from flexolmo_megatron.model.weights import live_model
from flexolmo_megatron.runtime.setup import local_device

Z_LOSS = 1e-3
"""Coefficient of the router's z-loss in every benchmark."""


def megatron_step(
    chunk: DistributedDataParallel, optimizer: MegatronOptimizer, batch: dict[str, Tensor], mask: Callable[[], None]
) -> float:
    """Take a training step; ``mask`` runs between the backward pass and the optimizer. Returns the loss before it."""
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    chunk.set_is_first_microbatch()
    loss = chunk(batch["tokens"], batch["positions"], None, labels=batch["labels"]).mean()
    loss.backward()
    finalize_model_grads([chunk])
    mask()
    optimizer.step()
    return loss.item()


def stock_spec(
    config: FlexOlmoTransformerConfig, backend: BackendSpecProvider | None = None
) -> TransformerBlockSubmodules:
    """Layers of a mixture with Megatron's own router; its MoELayer and experts are Megatron's already."""
    spec = block_spec("moe", config, backend)
    spec.layer_specs[0].submodules.mlp.submodules.router = TopKRouter  # one spec object for all layers
    return spec


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_batch(model: ModelConfig, sequences: int, length: int) -> dict[str, Tensor]:
    """Random tokens of a step, with their labels and positions, each `[sequences, length]` on this process's device."""
    tokens = torch.randint(model.vocab_size, (sequences, length + 1), device=local_device())
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "positions": torch.arange(length, device=local_device()).expand(sequences, length),
    }


def halves(pair: GPTModel, model: ModelConfig) -> tuple[LazyModel, LazyModel]:
    """Views of a live pair of that architecture: the published anchor, and the owner's part."""
    one = ModelCard("moe", replace(model, num_experts=1, top_k=1), [ExpertRecord(PUBLIC)])
    own = ModelCard("pair", model, [ExpertRecord(PUBLIC), ExpertRecord("owner")])
    return live_model(pair, one), live_model(pair, own)


def train_ffns_but_mask_anchor(mixture: GPTModel) -> Callable[[], None]:
    """Prepare a stock mixture of two for an owner's run as the research code does it (arXiv 2507.07024).

    Experts and routers train, all else is frozen.

    Returns:
        What is to be called between the backward pass and the optimizer: it sets the anchor's gradients to zero.
    """
    anchors, routers = [], []
    for name, parameter in mixture.named_parameters():
        parameter.requires_grad_(".mlp." in name)
        if ".local_experts.0." in name or name.endswith(("linear_fc1.weight0", "linear_fc2.weight0")):
            anchors.append(parameter)
        elif name.endswith("router.weight"):
            routers.append(parameter)
    assert len(anchors) == 2 * len(routers) == 2 * mixture.config.num_layers

    def mask() -> None:
        for parameter in anchors:
            parameter.main_grad.zero_()
        for parameter in routers:
            parameter.main_grad[0].zero_()

    return mask
