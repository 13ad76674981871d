"""Rounding to FP8, and the state that fp8_autocast sets."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from transformer_engine.common.recipe import DelayedScaling, Format, Recipe
from transformer_engine.pytorch.tensor import QuantizedTensor

QUANTISED: list[tuple[int, ...]] = []
"""Shape of each tensor that was quantised."""


class FP8GlobalStateManager:
    ENABLED = False
    RECIPE: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.ENABLED


@contextmanager
def fp8_autocast(enabled: bool = True, calibrating: bool = False, fp8_recipe: Any = None, fp8_group: Any = None,
                 _graph: bool = False) -> Iterator[None]:
    state = FP8GlobalStateManager
    before = state.ENABLED, state.RECIPE
    state.ENABLED, state.RECIPE = enabled, fp8_recipe
    try:
        yield
    finally:
        state.ENABLED, state.RECIPE = before


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    assert not enabled, "weights are quantised after they are loaded, not when they are made"
    yield


class Quantizer:
    def __init__(self, kind: torch.dtype, own_scale: bool) -> None:
        self.kind, self.own_scale, self.internal = kind, own_scale, True

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def __call__(self, tensor: Tensor) -> QuantizedTensor:
        QUANTISED.append(tuple(tensor.shape))
        largest = tensor.abs().max().float() if tensor.numel() else torch.tensor(0.0)
        scale = torch.finfo(self.kind).max / largest if self.own_scale and largest > 0 else torch.tensor(1.0)
        return QuantizedTensor.of(((tensor.float() * scale).to(self.kind).float() / scale).to(tensor.dtype))


class RecipeState:
    def __init__(self, recipe: Recipe, mode: str, num_quantizers: int) -> None:
        self.recipe, self.mode, self.num_quantizers = recipe, mode, num_quantizers

    @staticmethod
    def create(recipe: Recipe, *, mode: str, num_quantizers: int = 1, device: Any = None) -> "RecipeState":
        assert num_quantizers % (3 if mode == "forward" else 2) == 0
        return RecipeState(recipe, mode, num_quantizers)

    def make_quantizers(self) -> list[Quantizer]:
        wide = self.mode == "backward" and self.recipe.fp8_format is Format.HYBRID
        kind = torch.float8_e5m2 if wide else torch.float8_e4m3fn
        own_scale = not isinstance(self.recipe, DelayedScaling)
        return [Quantizer(kind, own_scale) for _ in range(self.num_quantizers)]
