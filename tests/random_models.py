"""Small random models in memory, with weights so large that logits and routing differ from token to token."""

import math
from dataclasses import replace

import torch

from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, ModelCard
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.names import expected_tensors

SIZES = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                    vocab_size=257, max_position_embeddings=64)
NAMES = [PUBLIC, "code", "math", "law", "news", "email", "maps", "poems"]


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations near 1, norms around 1, biases around 0."""
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * values
    if name.endswith("bias"):
        return 0.5 * values
    return values if "embed" in name else values / math.sqrt(shape[-1])


def lazy_model(card: ModelCard, tensors: dict[str, torch.Tensor]) -> LazyModel:
    """Wrap tensors in memory."""
    return LazyModel(card, {name: LazyTensor(value.dtype, tuple(value.shape), value.clone)
                            for name, value in tensors.items()})


def tensors_of(model: LazyModel) -> dict[str, torch.Tensor]:
    """Read every tensor."""
    return {name: tensor.read() for name, tensor in model.tensors.items()}


def random_model(kind: str, experts: int = 0, top_k: int = 0, *, seed: int = 0, bias: bool = False,
                 window: int = 1, sizes: ModelConfig = SIZES) -> LazyModel:
    """A dense, moe or pair model (experts = top_k = 2 for the latter) in fp32."""
    generator = torch.Generator().manual_seed(seed)
    config = replace(sizes, num_experts=experts, top_k=top_k, router_bias=bias, router_window=window)
    card = ModelCard(kind, config, [ExpertRecord(name) for name in NAMES[:experts]])
    return lazy_model(card, {name: random_tensor(name, shape, generator)
                             for name, shape in expected_tensors(config, kind).items()})
