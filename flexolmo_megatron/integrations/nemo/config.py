"""NeMo's configuration of the anchor, the pair and merged models."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import gpt_forward_step
from torch import nn

from flexolmo_megatron.config.card import ModelCard, numbered_experts
from flexolmo_megatron.config.layout import ModelKind
from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import ExpertConfig, TrainConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.builder import block_spec
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig, transformer_config
from flexolmo_megatron.model.engine import engine_settings
from flexolmo_megatron.training.planning import plan_start
from flexolmo_megatron.training.run_plan import Plan
from flexolmo_megatron.training.start import fill

PAPER, _EIGHT = (load_config(TrainConfig, preset=preset, overrides=["out=.", "data.train=[.]"])
                 for preset in ("7b-pair", "37b"))
"""The paper's settings, of an owner's run and of a merged model of eight experts."""
_7B, _37B = PAPER.model, _EIGHT.model
_SAME_NAME = [entry.name for entry in fields(ModelConfig) if entry.name not in ("num_experts", "top_k")]
"""Fields of ModelConfig that Megatron calls the same."""


def _layers(config: "FlexOlmoConfig", vp_stage: int | None = None) -> TransformerBlockSubmodules:
    return block_spec(config.kind, config, vp_stage=vp_stage)


def _forward_step(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """NeMo's, which without Transformer Engine insists on a mask; attention here is causal by itself."""
    return gpt_forward_step(model, {"attention_mask": None, **batch})


@dataclass
class FlexOlmoConfig(llm.GPTConfig, FlexOlmoTransformerConfig):
    """The 7B anchor, and the base of all others. What the architecture fixes is set whatever is given.

    Raises:
        FlexOlmoError: sizes that are impossible or that the parallel layout cannot split; ``start_from`` cannot be
            opened or is no published anchor (of a pair).
    """

    kind: ModelKind = "dense"
    """dense (an anchor), pair (an owner's run) or moe (merged)."""
    start_from: str | None = None
    """What to fill the model with before it trains, as ``flexolmo_megatron.load_model`` takes it; of a pair, the
    published anchor; of a mixture perhaps a dense model, whose FFN every expert begins as. Its sizes replace those
    given here. None for random weights, or to load a NeMo checkpoint."""
    expert: str = ""
    """Pair only: name of the owner's expert."""
    domain_vector: str | None = None
    """Pair only: file from `flexolmo embed`."""
    proxies: list[str] = field(default_factory=list)
    """Router tuning only, and what makes it so: experts of whose owners there are proxies among the data."""
    hf_tokenizer: str | None = None
    """Of a new anchor, folder or name of the data's Hugging Face tokenizer; None for bytes."""

    num_layers: int = _7B.num_layers
    hidden_size: int = _7B.hidden_size
    ffn_hidden_size: int = _7B.ffn_hidden_size
    num_attention_heads: int = _7B.num_attention_heads
    num_query_groups: int = _7B.num_query_groups
    vocab_size: int = _7B.vocab_size
    max_position_embeddings: int = _7B.max_position_embeddings
    seq_length: int = _7B.max_position_embeddings
    rotary_base: float = _7B.rotary_base
    layernorm_epsilon: float = _7B.layernorm_epsilon
    init_method_std: float = _7B.init_method_std
    position_embedding_type: str = "rope"
    share_embeddings_and_output_weights: bool = False
    moe_token_dispatcher_type: str = "alltoall"
    transformer_layer_spec: Any = _layers
    forward_step_fn: Any = _forward_step

    def __post_init__(self) -> None:  # NeMo calls it again when it has set the parallel sizes
        if self.start_from is not None:
            vars(self).update(sizes(self.plan()[1].built))
        given = ("tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size")
        values = transformer_config(
            self.model_config(), self.kind, dtype=self.params_dtype, config_class=dict,
            anchor_ffn_hidden_size=self.anchor_ffn_hidden_size, **{name: getattr(self, name) for name in given},
            **engine_settings(self.kind))
        values.pop("moe_token_dispatcher_type", None)  # alltoall unless given
        vars(self).update(values)
        super().__post_init__()

    def model_config(self) -> ModelConfig:
        """The architecture as the rest of the package describes it."""
        experts = {"dense": 0, "pair": 2}.get(self.kind, self.num_moe_experts or 0)
        top_k = 2 if self.kind == "pair" else self.moe_router_topk
        same = {name: getattr(self, name) for name in _SAME_NAME}
        return ModelConfig(num_experts=experts, top_k=top_k if experts else 0, **same)

    def plan(self) -> tuple[TrainConfig, Plan]:
        """What a run from ``start_from`` is, in terms of ``flexolmo train``; no tensor is read.

        Raises:
            FlexOlmoError: it cannot be opened, or is of another kind.
        """
        owner = ExpertConfig(self.expert, self.domain_vector, bias=self.router_bias,
                             router_window=self.router_window)
        config = TrainConfig(out=".", anchor=self.start_from, model=self.model_config(), expert=owner)
        if self.proxies:
            config.anchor, config.merged = None, self.start_from
            config.data.proxies = dict.fromkeys(self.proxies, [])
            return config, plan_start("router", config)
        return config, plan_start("expert" if self.kind == "pair" else self.kind, config)

    def card(self) -> ModelCard:
        """What the run trains, without the digest of what it starts from."""
        if self.start_from is not None:
            return self.plan()[1].card
        tokenizer = {"type": "huggingface", "path": self.hf_tokenizer} if self.hf_tokenizer else {"type": "byte"}
        model = self.model_config()
        return ModelCard(self.kind, model, numbered_experts(model.num_experts), tokenizer=tokenizer)

    def fill_and_freeze(self, module: nn.Module) -> ModelCard:
        """Give a new model the weights of ``start_from``, by which what does not train is frozen. Called by all ranks.

        Returns:
            What it is then, with the digest of the anchor or of the merged model.
        """
        if self.start_from is None:
            if self.kind == "pair" or self.proxies:
                raise FlexOlmoError("start_from has no value: expected the published anchor, or for router tuning the "
                                    "merged model")
            return self.card()
        if (self.virtual_pipeline_model_parallel_size or 1) > 1:
            raise FlexOlmoError("virtual_pipeline_model_parallel_size = "
                                f"{self.virtual_pipeline_model_parallel_size}: expected none with start_from, "
                                "since NeMo builds the stages one after the other; use `flexolmo train`")
        config, planned = self.plan()
        fill([module], planned, config)
        return planned.card


def sizes(card: ModelCard) -> dict[str, Any]:
    """The fields of ``FlexOlmoConfig`` that say how large a model is."""
    model = card.model
    experts = {} if card.kind == "dense" else dict(num_moe_experts=model.num_experts, moe_router_topk=model.top_k)
    return {name: getattr(model, name) for name in _SAME_NAME} | experts


@dataclass
class FlexOlmoConfigPair(FlexOlmoConfig):
    """The 7B anchor and one owner's expert, 11.6 B parameters of which 4.33 B train."""

    kind: ModelKind = "pair"
    router_bias: bool = True
    moe_z_loss_coeff: float | None = TrainConfig.moe_z_loss_coeff


@dataclass
class FlexOlmoConfig7x7B(FlexOlmoConfig):
    """A merged model of seven experts, 33.3 B parameters; top-k as transformers' FlexOlmoConfig has it."""

    kind: ModelKind = "moe"
    num_moe_experts: int = 7
    moe_router_topk: int = 5


@dataclass
class FlexOlmoConfig37B(FlexOlmoConfig7x7B):
    """The paper's merged model of eight experts, 37.6 B parameters, 20.3 B active."""

    num_moe_experts: int = _37B.num_experts
    moe_router_topk: int = _37B.top_k
