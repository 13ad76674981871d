"""Providers of this package's models for Megatron-Bridge, and the conversion that its AutoBridge finds.

Hugging Face's format has no router bias: ``model_provider`` loads merged models that have one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ColumnParallelMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from transformers import FlexOlmoForCausalLM, Olmo2ForCausalLM

from flexolmo_megatron.config.card import ModelCard, numbered_experts
from flexolmo_megatron.convert.huggingface_config import parse_config, render_config
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.names import TABLE, Rule
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.builder import block_spec, build_model
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig, transformer_config
from flexolmo_megatron.model.engine import engine_settings
from flexolmo_megatron.model.owners import OwnersModel
from flexolmo_megatron.model.weights import load_weights


@dataclass
class FlexOlmoProvider(FlexOlmoTransformerConfig, GPTModelProvider):
    """Bridge's provider of any model of this package; made by ``provider``."""

    flexolmo_card: str = ""
    """What the model is, as JSON: it is then in the run_config.yaml of every checkpoint, where ``write_cards`` reads
    it."""

    @property
    def card(self) -> ModelCard:
        return ModelCard.from_json(self.flexolmo_card)

    def finalize(self) -> None:
        """Bridge's, after a check that nobody has changed the architecture.

        Raises:
            FlexOlmoError: a size is not the card's.
        """
        for name, value in _sizes(self.card).items():
            if getattr(self, name) != value:
                raise FlexOlmoError(f"model.{name} = {getattr(self, name)}: expected {value}, as the model's card says")
        super().finalize()

    def provide(self, pre_process: bool | None = None, post_process: bool | None = None,
                vp_stage: int | None = None) -> GPTModel:
        """Build this rank's part; None means True, as on a single pipeline stage."""
        card = self.card
        return build_model(
            card.model,
            card.kind,
            self,
            pre_process=pre_process is not False,
            post_process=post_process is not False,
            vp_stage=vp_stage,
            model_class=OwnersModel if card.kind == "pair" else GPTModel,
            pg_collection=self._pg_collection,
        )


def _sizes(card: ModelCard) -> dict[str, Any]:
    size = card.model
    return dict(num_layers=size.num_layers, hidden_size=size.hidden_size, ffn_hidden_size=size.ffn_hidden_size,
                num_attention_heads=size.num_attention_heads, num_query_groups=size.num_query_groups,
                kv_channels=size.head_dim, vocab_size=size.vocab_size, rotary_base=size.rotary_base,
                layernorm_epsilon=size.layernorm_epsilon, num_moe_experts=size.num_experts or None)


def _layers(config: FlexOlmoProvider, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    return block_spec(config.card.kind, config, vp_stage=vp_stage)


def provider(card: ModelCard, dtype: torch.dtype = torch.bfloat16, **options: Any) -> FlexOlmoProvider:
    """Return the provider of a model.

    Args:
        card: what it is: dense (the anchor), pair (an owner's run) or moe (merged).
        dtype: of weights and activations; bfloat16 or float32.
        options: fields of the provider, such as parallel sizes.
    """
    values = dict(
        flexolmo_card=card.to_json(),
        transformer_layer_spec=_layers,
        vocab_size=card.model.vocab_size,
        seq_length=card.model.max_position_embeddings,
        rotary_base=card.model.rotary_base,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        hetereogenous_dist_checkpoint=True,  # upstream's name: a key per layer, as ``convert`` reads checkpoints
    )
    values |= engine_settings(card.kind) | options
    return transformer_config(card.model, card.kind, dtype=dtype, config_class=FlexOlmoProvider, **values)


def model_provider(path: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> FlexOlmoProvider:
    """Return a provider that fills its model from any model of this package: merged ones with biases, anchors, runs.

    Args:
        path: what ``flexolmo_megatron.load_model`` takes.
        dtype: of weights and activations.
        options: fields of the provider.
    """
    source = open_model(path)
    made = provider(source.card, dtype, **options)

    def fill(chunks: list[GPTModel]) -> list[GPTModel]:
        load_weights(chunks, source)
        return chunks

    made.register_pre_wrap_hook(fill)
    return made


class _RowMapping(RowParallelMapping):
    """Bridge's, whose parts are views with gaps: it sends what lies in memory where nothing has copied them."""

    def scatter_to_tp_ranks(self, splits: list[torch.Tensor] | None, *args: Any, **options: Any) -> torch.Tensor:
        """Send each tensor-parallel rank its part."""
        return super().scatter_to_tp_ranks(splits and [part.contiguous() for part in splits], *args, **options)


class _LocalExpert:
    """An expert of SequentialMLP, which Bridge 0.3.1 cannot export: it looks for an expert's number at a name's end."""

    def resolve(self, captures: tuple[str, ...]) -> MegatronParamMapping:
        if self.ep_size > 1:  # Bridge would give every rank the experts of the first
            raise FlexOlmoError("megatron-bridge 0.3.1 cannot number local experts under expert parallelism "
                                f"({self.ep_size} processes): expected model.moe_grouped_gemm=true, or 1 process")
        return super().resolve(captures)

    def gather_from_ep_ranks(self, weights: torch.Tensor, module: Any, name: str) -> dict[str, torch.Tensor]:
        return {name: weights}


class _LocalGatedMLP(_LocalExpert, GatedMLPMapping):
    pass


class _LocalRow(_LocalExpert, _RowMapping):
    pass


def _mappings(rule: Rule) -> list[MegatronParamMapping]:
    """One row of ``convert/names.py`` as Bridge's mappings, by the letters of its shapes."""
    key = rule.key.replace("{l}", "*")
    names = [name.replace("{l}", "*").replace("{e}", "*") for name in rule.parts]
    if ".experts.experts." in key:  # TEGroupedMLP's names, and SequentialMLP's
        grouped = key.replace(".experts.experts.", ".experts.") + "*"
        local = key.replace(".experts.experts.", ".experts.local_experts.*.")
        if len(names) == 2:
            return [GatedMLPMapping(grouped, *names), _LocalGatedMLP(local, *names)]
        return [_RowMapping(grouped, *names), _LocalRow(local, *names)]
    if rule.interleaved:
        return [QKVMapping(key, *names)]
    if len(names) == 2:
        return [GatedMLPMapping(key, *names)]
    (letters,) = rule.parts.values()
    if letters[0] in "Vqk":
        return [ColumnParallelMapping(key, *names)]
    return [(_RowMapping if letters[1:] in ("q", "f") else ReplicatedMapping)(key, *names)]


class FlexOlmoBridge(MegatronModelBridge):
    """Between Hugging Face's FlexOlmoForCausalLM or Olmo2ForCausalLM and Megatron, both ways."""

    def provider_bridge(self, hf_pretrained: Any) -> FlexOlmoProvider:
        config = hf_pretrained.config
        model, kind = parse_config(config.to_dict(), f"config.json of {config.name_or_path or 'the model'}")
        dtype = getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
        return provider(ModelCard(kind, model, numbered_experts(model.num_experts)), dtype)

    @classmethod
    def megatron_to_hf_config(cls, provider: FlexOlmoProvider) -> dict[str, Any]:
        card = provider.card
        return render_config(card.model, card.kind, provider.params_dtype, {})

    def mapping_registry(self) -> MegatronMappingRegistry:
        kind = "moe" if self.MODEL_TYPE == "flex_olmo" else "dense"
        return MegatronMappingRegistry(
            *(mapping for rule in TABLE[kind] if not rule.only_with_bias for mapping in _mappings(rule))
        )


@MegatronModelBridge.register_bridge(source=FlexOlmoForCausalLM, target=GPTModel, model_type="flex_olmo")
class _MoeBridge(FlexOlmoBridge):
    pass


@MegatronModelBridge.register_bridge(source=Olmo2ForCausalLM, target=GPTModel, model_type="olmo2")
class _DenseBridge(FlexOlmoBridge):
    pass


AutoMapping.register_module_type("ColumnLinear", "column")  # for the fused q/k/v, inside QKVMapping
