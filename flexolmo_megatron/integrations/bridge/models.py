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
from transformers import FlexOlmoForCausalLM, Olmo2ForCausalLM

from flexolmo_megatron.config.card import ModelCard, numbered_experts
from flexolmo_megatron.convert.huggingface_config import parse_config, render_config
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.names import TABLE, Rule
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.builder import build_model
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig, transformer_config
from flexolmo_megatron.model.engine import engine_settings
from flexolmo_megatron.model.trained_part import TrainedPartModel
from flexolmo_megatron.model.weights import load_weights


@dataclass
class FlexOlmoProvider(FlexOlmoTransformerConfig, GPTModelProvider):
    """Bridge's provider of any model of this package; made by ``provider``."""

    flexolmo_card: str = ""
    """What the model is, as JSON: it is then in the run_config.yaml of every checkpoint, where ``write_cards`` reads
    it."""
    flexolmo_merged: str | None = None
    """Router tuning only: the merged model that is tuned."""

    @property
    def card(self) -> ModelCard:
        return ModelCard.from_json(self.flexolmo_card)

    def finalize(self) -> None:
        """Bridge's, after a check that nobody has changed the architecture.

        Raises:
            FlexOlmoError: a size is not the card's.
        """
        expected = provider(self.card)
        for name in _ARCHITECTURE:
            if getattr(self, name) != getattr(expected, name):
                raise FlexOlmoError(f"model.{name} = {getattr(self, name)}: expected {getattr(expected, name)}, as the "
                                    "model's card says")
        super().finalize()

    def provide(self, pre_process: bool | None = None, post_process: bool | None = None,
                vp_stage: int | None = None) -> GPTModel:
        """Build this rank's part; None means True, as on a single pipeline stage."""
        card = self.card
        return build_model(
            card.model,
            card.model_kind,
            self,
            pre_process=pre_process is not False,
            post_process=post_process is not False,
            vp_stage=vp_stage,
            model_class=TrainedPartModel if card.kind in ("pair", "router") else GPTModel,
            pg_collection=self._pg_collection,
        )


_ARCHITECTURE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                 "kv_channels", "vocab_size", "rotary_base", "layernorm_epsilon", "num_moe_experts", "moe_router_topk",
                 "router_bias", "router_window")
"""What nobody may change of a provider."""


def provider(card: ModelCard, dtype: torch.dtype = torch.bfloat16, **options: Any) -> FlexOlmoProvider:
    """Return the provider of a model.

    Args:
        card: what it is: dense (the anchor), pair (an owner's run), moe (merged) or router (merged, to be tuned).
        dtype: of weights and activations; bfloat16 or float32.
        options: fields of the provider, such as parallel sizes.
    """
    values = dict(
        flexolmo_card=card.to_json(),
        vocab_size=card.model.vocab_size,
        seq_length=card.model.max_position_embeddings,
        rotary_base=card.model.rotary_base,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        hetereogenous_dist_checkpoint=True,  # upstream's name: a key per layer, as ``convert`` reads checkpoints
    )
    values |= engine_settings(card.model_kind) | options
    return transformer_config(card.model, card.model_kind, dtype=dtype, config_class=FlexOlmoProvider, **values)


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
        rope = getattr(config, "rope_parameters", None) or {}
        if "rope_theta" in rope:  # transformers 4.57 looks at the other place alone, and fills in a default
            config.rope_theta = rope["rope_theta"]
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
