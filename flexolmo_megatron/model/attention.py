"""Self-attention as in OLMo 2: RMSNorm over the whole query and key projections, before RoPE.

Legend: s sequence, b batch, n query heads of this rank, g key/value groups of this rank, d head size.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from flexolmo_megatron.model.norm import ProjectionRMSNorm


class FlexOlmoSelfAttention(SelfAttention):
    """Megatron's self-attention with norms over the full projections instead of per head."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection)
        # Upstream leaves these None (the spec names no per-head norm), so its forward does not apply them.
        self.q_layernorm = ProjectionRMSNorm(config, config.num_attention_heads, self.pg_collection.tp)
        self.k_layernorm = ProjectionRMSNorm(config, config.num_query_groups, self.pg_collection.tp)


class TorchAttention(MegatronModule):
    """Core attention of the local backend: torch's scaled_dot_product_attention.

    Unlike upstream's DotProductAttention it never stores the `[b, n, s, s]` scores. No dropout, no sliding window,
    no packed sequences, no context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1 or config.attention_dropout:
            raise ValueError("TorchAttention supports neither context parallelism nor attention dropout")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: None = None,
    ) -> Tensor:
        """Attend from `[sq, b, n, d]` to `[sk, b, g, d]`; returns `[sq, b, n * d]`.

        attention_mask is None for plain causal attention (the last query sees all keys), or boolean
        `[b, 1, sq, sk]`, True where a query must not look (Megatron's convention).
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        queries, keys = query.shape[2], key.shape[2]
        mask = None
        if attention_mask is not None:
            mask = ~attention_mask
        elif 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        context_BNSD = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and queries == keys,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)
