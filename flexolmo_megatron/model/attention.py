"""Self-attention as in OLMo 2: RMSNorm over the whole query and key projections, before RoPE.

Legend: s sequence, b batch, n query heads of this rank, g key/value groups of this rank, d head size.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
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


def _positions(tokens_per_rank: int, ranks: int) -> Tensor:
    """Places in the sequence `[ranks, tokens_per_rank]` of each context-parallel rank's tokens.

    Rank r has the chunks r and 2 * ranks - 1 - r of 2 * ranks (Megatron's get_batch_on_this_cp_rank), which balances
    causal attention.
    """
    chunks = torch.arange(tokens_per_rank * ranks).view(2 * ranks, -1)
    return torch.cat([chunks[:ranks], chunks[ranks:].flip(0)], dim=1)


class TorchAttention(MegatronModule):
    """Core attention of the local backend: torch's scaled_dot_product_attention.

    Unlike upstream's DotProductAttention it never stores the `[b, n, s, s]` scores. No dropout, no sliding window,
    no packed sequences. Under context parallelism every rank gathers all keys and values of a sequence, so memory falls
    less than with Transformer Engine's ring.
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
        if config.attention_dropout:
            raise ValueError("TorchAttention does not support attention dropout")
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None

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

        attention_mask is None for plain causal attention (the last query sees all keys), or boolean `[b, 1, sq, sk]`,
        True where a query must not look (Megatron's convention). Under context parallelism sq and sk are this rank's
        part of the sequence, and there is no mask.
        """
        mask = None
        if attention_mask is not None:
            mask = ~attention_mask
        if self.cp_group is not None:
            assert mask is None and len(query) == len(key), "context parallelism is for plain causal attention"
            positions = _positions(len(query), self.cp_group.size()).to(query.device)
            mask = positions[self.cp_group.rank()][:, None] >= positions.flatten()
            # In the order of the ranks, not of the sequence: the mask knows. The gradients are summed over the ranks.
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        queries, keys = query.shape[2], key.shape[2]
        if mask is None and 1 < queries < keys:
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
