"""Which modules a layer is built from: Transformer Engine's where it is installed, else local ones."""

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from flexolmo_megatron.config.layout import ModelKind
from flexolmo_megatron.model.attention import FlexOlmoSelfAttention, TorchAttention
from flexolmo_megatron.model.ffn import GatedFFN
from flexolmo_megatron.model.layer import FlexOlmoLayer, FlexOlmoLayerSubmodules
from flexolmo_megatron.model.linear import ColumnLinear
from flexolmo_megatron.model.mixture_input import MixtureInput
from flexolmo_megatron.model.norm import RMSNorm
from flexolmo_megatron.model.pair import CoupledPair, CoupledPairSubmodules
from flexolmo_megatron.model.router import DomainRouter, PairRouter


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's local modules, with a norm that allows sequence parallelism and attention without stored scores."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return TorchAttention

    def column_parallel_linear(self) -> type:
        return ColumnLinear


def engine_is_default() -> bool:
    """Whether models are built from Transformer Engine's modules: it is installed, and there is a GPU for it."""
    return HAVE_TE and torch.cuda.is_available()


def default_backend() -> BackendSpecProvider:
    """Transformer Engine's modules where it can run, else ``TorchSpecProvider``.

    Transformer Engine's: attention (also under context parallelism), norms, linear layers, and for the merged model
    TEGroupedMLP, one grouped matrix product over the experts that a process has. The norms of queries and keys are ours
    (``ProjectionRMSNorm``): they span all heads of all tensor-parallel processes. Both kinds of modules have the same
    tensors under the same names in checkpoints; Transformer Engine's further entries, ``_extra_state``, hold no weight
    and are left out (``model/weights.py``, ``training/checkpoint.py``).
    """
    if engine_is_default():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return TorchSpecProvider()


def _mlp_spec(kind: ModelKind, backend: BackendSpecProvider) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    if kind == "dense":
        return ModuleSpec(module=GatedFFN, submodules=linears)
    if kind == "pair":
        return ModuleSpec(module=CoupledPair, submodules=CoupledPairSubmodules(mlp=linears, router=PairRouter))
    grouped_gemm = not isinstance(backend, LocalSpecProvider)
    experts, expert_linears = backend.grouped_mlp_modules(grouped_gemm, False)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(experts=ModuleSpec(module=experts, submodules=expert_linears), router=DomainRouter),
    )


def layer_spec(kind: ModelKind, backend: BackendSpecProvider | None = None) -> ModuleSpec:
    """The spec of one decoder layer.

    Args:
        kind: dense (anchor, baselines), pair (anchor-coupled training) or moe (merged model).
        backend: Megatron's provider of modules; None picks ``default_backend()``.
    """
    backend = backend or default_backend()
    norm = backend.layer_norm(rms_norm=True)
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
    )
    return ModuleSpec(
        module=FlexOlmoLayer,
        submodules=FlexOlmoLayerSubmodules(
            self_attention=ModuleSpec(
                module=FlexOlmoSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            post_self_attn_layernorm=norm,
            pre_mlp_layernorm=MixtureInput if kind == "moe" else IdentityOp,
            mlp=_mlp_spec(kind, backend),
            mlp_bda=get_bias_dropout_add,
            post_mlp_layernorm=norm,
        ),
    )
