"""The modules that megatron-core subclasses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_engine.pytorch import distributed, ops  # noqa: F401
from transformer_engine.pytorch.quantization import (
    FP8GlobalStateManager,
    Quantizer,
    RecipeState,
    fp8_autocast,
    fp8_model_init,
)
from transformer_engine.pytorch.tensor import QuantizedTensor

__all__ = ["fp8_autocast", "fp8_model_init"]

RAN: list[tuple[nn.Module, bool]] = []
"""Each linear module that ran, and whether in FP8."""


class _Product(torch.autograd.Function):
    """y = x w^T; a gradient for w only where it requires one, then added to main_grad where that was asked for."""

    @staticmethod
    def forward(ctx, x, weight, used, gradient_quantizer, fuse, first):
        ctx.save_for_backward(x if weight.requires_grad else None, used)
        ctx.weight, ctx.quantizer, ctx.fuse, ctx.first = weight, gradient_quantizer, fuse, first
        ctx.needs_input = x.requires_grad
        return torch.mm(x, used.t())

    @staticmethod
    def backward(ctx, gradient):
        x, used = ctx.saved_tensors
        if ctx.quantizer is not None:
            gradient = ctx.quantizer(gradient).as_subclass(torch.Tensor)
        weight_gradient = None
        input_gradient = torch.mm(gradient, used) if ctx.needs_input else None
        if ctx.weight.requires_grad:
            weight_gradient = torch.mm(gradient.t(), x)
            if ctx.fuse:
                main = ctx.weight.main_grad
                main.copy_(weight_gradient) if ctx.first else main.add_(weight_gradient)
                ctx.weight.grad_added_to_main_grad = True
                weight_gradient = torch.empty_like(ctx.weight)
        return input_gradient, weight_gradient, None, None, None, None


class TransformerEngineBaseModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = False
        self._fp8_workspaces: dict[str, QuantizedTensor] = {}

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()

    def _quantizers(self) -> list[Quantizer]:
        """Of input, weight and output's gradient; a new delayed one scales by 1, having no past."""
        recipe = FP8GlobalStateManager.RECIPE
        forward = RecipeState.create(recipe, mode="forward", num_quantizers=3).make_quantizers()
        return [*forward[:2], RecipeState.create(recipe, mode="backward", num_quantizers=2).make_quantizers()[0]]

    def get_weight_workspace(
        self, tensor: Tensor, quantizer: Quantizer, cache_name: str | None, update: bool
    ) -> Tensor:
        if isinstance(tensor, QuantizedTensor):
            return tensor
        out = self._fp8_workspaces.get(cache_name)
        if out is None or update:
            out = quantizer(tensor.detach())
            if cache_name is not None:
                self._fp8_workspaces[cache_name] = out
        return out

    def _product(self, x: Tensor, name: str, first: bool | None) -> Tensor:
        weight, used, gradient_quantizer = getattr(self, name), getattr(self, name), None
        if self.fp8:
            input_quantizer, weight_quantizer, gradient_quantizer = self._quantizers()
            cache = None if first is None else name
            used = self.get_weight_workspace(weight, weight_quantizer, cache, first is None or first)
            # A gradient passes as if rounding were the identity.
            x = x + (input_quantizer(x.detach()).as_subclass(torch.Tensor) - x.detach())
        used = used.detach().as_subclass(torch.Tensor).to(x.dtype)
        return _Product.apply(x, weight, used, gradient_quantizer, self.fuse_wgrad_accumulation, bool(first))


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert not bias and not return_bias
        self.tp_group, self.sequence_parallel = tp_group, tp_size > 1 and sequence_parallel
        out_features //= tp_size if parallel_mode == "column" else 1
        in_features //= tp_size if parallel_mode == "row" else 1
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.fuse_wgrad_accumulation, self.parallel_mode, self.tp_size = fuse_wgrad_accumulation, parallel_mode, tp_size
        self.save_original_input = save_original_input
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=params_dtype))
        with torch.no_grad():
            init_method(self.weight)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False) -> Tensor:
        self.init_fp8_metadata()
        RAN.append((self, self.fp8))
        inp = self._communicated(inp, "column", "gather_from_sequence", "copy_to_tensor_model")
        out = self._product(inp.reshape(-1, inp.shape[-1]), "weight", is_first_microbatch).view(*inp.shape[:-1], -1)
        return self._communicated(out, "row", "reduce_scatter_to_sequence", "reduce_from_tensor_model")

    def _communicated(self, tensor: Tensor, mode: str, with_sequence: str, without: str) -> Tensor:
        if self.tp_size == 1 or self.parallel_mode != mode:
            return tensor
        from megatron.core.tensor_parallel import mappings

        name = f"{with_sequence if self.sequence_parallel else without}_parallel_region"
        return getattr(mappings, name)(tensor, group=self.tp_group)


class LayerNormLinear(Linear):
    """Only subclassed by Megatron, not used here."""


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert not bias and not return_bias
        self.num_gemms, self.use_bias, self.fuse_wgrad_accumulation = num_gemms, bias, fuse_wgrad_accumulation
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=params_dtype))
            with torch.no_grad():
                init_method(weight)
            self.register_parameter(f"weight{index}", weight)

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        self.init_fp8_metadata(self.num_gemms)
        RAN.append((self, self.fp8))
        if self.fp8:
            assert all(rows % 16 == 0 for rows in m_splits), "FP8 needs padded splits"
        parts = [
            self._product(part, f"weight{index}", is_first_microbatch)
            for index, part in enumerate(inp.split(m_splits))
        ]
        return torch.cat(parts)


class RMSNorm(nn.RMSNorm):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        assert not zero_centered_gamma
        super().__init__(normalized_shape or hidden_size, eps=eps, dtype=params_dtype, device=device)
        self.weight.sequence_parallel = sequence_parallel

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass


class LayerNorm(nn.LayerNorm):
    """Only named by Megatron, not used here."""


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
    ) -> None:
        super().__init__()
        assert attn_mask_type == "causal" and attention_dropout == 0.0
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Tensor:
        assert attention_mask is None and options["attn_mask_type"] == "causal"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass


def _padded(rows: list[int]) -> list[int]:
    return [(count + 15) // 16 * 16 for count in rows]


class Fp8Padding(nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        parts = [
            nn.functional.pad(part, (0, 0, 0, rows - len(part)))
            for part, rows in zip(inp.split(m_splits), _padded(m_splits), strict=True)
        ]
        return torch.cat(parts), _padded(m_splits)


class Fp8Unpadding(nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        return torch.cat([part[:rows] for part, rows in zip(inp.split(_padded(m_splits)), m_splits, strict=True)])
