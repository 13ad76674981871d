"""From a model's architecture to Megatron's TransformerConfig."""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from flexolmo_megatron.config.layout import ModelKind, split_problems
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import ParallelConfig
from flexolmo_megatron.errors import FlexOlmoError


@dataclass
class FlexOlmoTransformerConfig(TransformerConfig):
    """Megatron's configuration with what its router and pair layer need beyond it."""

    router_bias: bool = field(default=False)
    """Whether routers have a bias per expert, used as min(bias, 0)."""
    router_window: int = 1
    """Positions over which routing logits are averaged."""
    domain_loss_coeff: float = 0.0
    """Pair only: weight of the loss that teaches the router to tell the owner's documents from public ones."""
    domain_margin: float = 4.0
    """Pair only: difference of the two logits that this loss asks for."""
    anchor_ffn_hidden_size: int | None = None
    """Pair only: inner width of the anchor's FFN; ffn_hidden_size is the owner's."""


def transformer_config(
    model: ModelConfig,
    kind: ModelKind,
    *,
    dtype: torch.dtype = torch.float32,
    anchor_ffn_hidden_size: int | None = None,
    config_class: type[FlexOlmoTransformerConfig] = FlexOlmoTransformerConfig,
    **overrides: Any,
) -> FlexOlmoTransformerConfig:
    """Return the Megatron configuration of a model.

    Args:
        model: the architecture; for a pair, of the coupled model (num_experts = top_k = 2).
        kind: dense, moe or pair.
        dtype: of weights and activations; float32 or bfloat16.
        anchor_ffn_hidden_size: pair only, where the owner's expert is narrower than the anchor's FFN.
        config_class: what is made; another framework's configuration may add fields of its own.
        overrides: any field of it, for example parallel sizes.

    Raises:
        FlexOlmoError: the architecture cannot be split over the given parallel sizes.
    """
    values: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Megatron's random states are CUDA's. A run does not use these weights: convert/initial.py makes its own, which
        # do not depend on the layout.
        use_cpu_initialization=not torch.cuda.is_available(),
        # Upstream's fusions are torch.compile'd or CUDA-only: Transformer Engine brings its own on CUDA.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,  # it rounds gradients to bfloat16, also in an fp32 run
        attention_softmax_in_fp32=True,  # core's default; NeMo's and Bridge's configurations have another
        persist_layer_norm=False,
        cuda_graph_scope=[],
        router_bias=model.router_bias,
        router_window=model.router_window,
        anchor_ffn_hidden_size=anchor_ffn_hidden_size,
    )
    if kind != "dense":
        values |= dict(
            num_moe_experts=model.num_experts,
            moe_router_topk=model.top_k,
            moe_ffn_hidden_size=model.ffn_hidden_size,
            moe_router_pre_softmax=True,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_token_dispatcher_type="alltoall",
        )
    values |= overrides
    _check_split(model, kind, values)
    return config_class(**values)


def _check_split(model: ModelConfig, kind: ModelKind, values: dict[str, Any]) -> None:
    parallel = ParallelConfig(
        tensor=values.get("tensor_model_parallel_size", 1),
        expert=values.get("expert_model_parallel_size", 1),
        expert_tensor=values.get("expert_tensor_parallel_size"),
    )
    for problem in split_problems(model, kind, parallel, values["anchor_ffn_hidden_size"]):
        raise FlexOlmoError(problem)
