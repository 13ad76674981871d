"""A new model's random weights, by canonical name: the same ones in any parallel layout and for any file format.

Each tensor has a random generator of its own, seeded by the run's seed and the tensor's name, and is drawn whole in
fp32 on the CPU. A rank that holds a part of it draws all of it and keeps its part, one tensor at a time.
"""

import hashlib
import math

import torch

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.names import expected_tensors

_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def _named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for one tensor, independent of those for other names and seeds."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def random_model(card: ModelCard, seed: int) -> LazyModel:
    """Return a model with Megatron's initial weights (fp32), drawn anew each time one of them is read.

    Norms are 1 and router biases 0; other weights are normal with the standard deviation model.init_method_std, which
    those that write into the residual stream (`o_proj`, `down_proj`) have divided by sqrt(2 * num_layers).

    Args:
        card: what to make; any kind.
        seed: of the run.
    """
    std = card.model.init_method_std
    scaled = std / math.sqrt(2 * card.model.num_layers)

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith(".mlp.gate.bias"):
            return torch.zeros(shape)
        if name.split(".")[-2].endswith("norm"):
            return torch.ones(shape)
        return torch.empty(shape).normal_(
            std=scaled if name.endswith(_INTO_RESIDUAL) else std, generator=_named_generator(seed, name)
        )

    shapes = expected_tensors(card.model, card.kind)
    return LazyModel(
        card,
        {
            name: LazyTensor(torch.float32, shape, lambda name=name, shape=shape: read(name, shape))
            for name, shape in shapes.items()
        },
    )
