"""NeMo's configuration, model, optimizer and data module for the anchor, the pair and merged models."""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import gpt_forward_step
from nemo.core.optim import McoreDistributedOptimizer
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.lightning.pytorch.optim import MegatronOptimizerModule, OptimizerModule
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch import nn

from flexolmo_megatron.config.card import ModelCard, numbered_experts
from flexolmo_megatron.config.layout import ModelKind
from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import DataConfig, ExpertConfig, TrainConfig
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.rows import untuned
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.builder import block_spec
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig, transformer_config
from flexolmo_megatron.model.engine import engine_settings
from flexolmo_megatron.model.router import hold_biases_at_zero
from flexolmo_megatron.training.freezing import FrozenMark, freeze_all_but_router, freeze_anchor
from flexolmo_megatron.training.planning import plan_expert
from flexolmo_megatron.training.run import run_datasets
from flexolmo_megatron.training.run_plan import Plan
from flexolmo_megatron.training.start import fill


def _preset(name: str) -> ModelConfig:
    return load_config(TrainConfig, preset=name, overrides=["out=.", "data.train=[.]"]).model


_7B, _37B = _preset("7b-pair"), _preset("37b")


_SAME_NAME = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
              "max_position_embeddings", "rotary_base", "layernorm_epsilon", "init_method_std", "router_bias")
"""Fields of ModelConfig that NeMo's and ours call the same."""


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
    published anchor. Its sizes replace those given here. None for random weights, or to load a NeMo checkpoint."""
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
    cross_entropy_loss_fusion: bool = False
    """Megatron's fused loss rounds gradients to bfloat16, also in an fp32 run."""
    moe_token_dispatcher_type: str = "alltoall"
    transformer_layer_spec: Any = _layers
    forward_step_fn: Any = _forward_step

    def __post_init__(self) -> None:  # NeMo calls it again when it has set the parallel sizes
        if self.start_from is not None:
            vars(self).update(sizes(self.plan()[1].card))
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
        experts, top_k = {"dense": (0, 0), "pair": (2, 2)}.get(self.kind, (self.num_moe_experts, self.moe_router_topk))
        same = {name: getattr(self, name) for name in _SAME_NAME}
        return ModelConfig(num_experts=experts, top_k=top_k, **same)

    def plan(self) -> tuple[TrainConfig, Plan]:
        """What a run from ``start_from`` is, in terms of ``flexolmo train``; no tensor is read.

        Raises:
            FlexOlmoError: it cannot be opened, or is of another kind.
        """
        owner = ExpertConfig(self.expert, self.domain_vector, bias=self.router_bias)
        config = TrainConfig(out=".", anchor=self.start_from, expert=owner)
        if self.kind == "pair":
            return config, plan_expert(config)
        source = open_model(self.start_from)
        if self.kind == "dense":
            source = as_dense(source)
        elif self.proxies:
            source = untuned(source)
        if source.card.kind != self.kind:
            raise FlexOlmoError(f"start_from = {self.start_from} is a {source.card.kind} model: expected {self.kind}")
        return config, Plan(source.card, source)

    def card(self) -> ModelCard:
        """What the model is; of a pair without the anchor's digest, of router tuning the merged model."""
        if self.start_from is not None:
            return self.plan()[1].card
        tokenizer = {"type": "huggingface", "path": self.hf_tokenizer} if self.hf_tokenizer else {"type": "byte"}
        model = self.model_config()
        return ModelCard(self.kind, model, numbered_experts(model.num_experts), tokenizer=tokenizer)

    def fill_and_freeze(self, module: nn.Module) -> None:
        """Give a new model the weights of ``start_from`` and freeze what does not train. Called by all ranks."""
        if self.start_from is not None:
            if (self.virtual_pipeline_model_parallel_size or 1) > 1:
                raise FlexOlmoError("virtual_pipeline_model_parallel_size = "
                                    f"{self.virtual_pipeline_model_parallel_size}: expected none with start_from, "
                                    "since NeMo builds the stages one after the other; use `flexolmo train`")
            config, planned = self.plan()
            fill([module], planned, config)
        if self.kind == "pair":
            freeze_anchor(module)
        elif self.proxies:
            freeze_all_but_router(module)


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


class FlexOlmoModel(llm.GPTModel):
    """NeMo's GPTModel; what it starts from is loaded and frozen before NeMo makes DDP and the optimizer."""

    def __init__(self, config: FlexOlmoConfig | None = None, optim: OptimizerModule | None = None,
                 tokenizer: Any = None, model_transform: Any = None) -> None:
        optim = optim or FlexOlmoOptimizer(OptimizerConfig(lr=TrainConfig().optimizer.lr))
        super().__init__(config or FlexOlmoConfig(), optim, tokenizer, model_transform)

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build, fill and freeze; does nothing where that is done."""
        if not hasattr(self, "module"):
            super().configure_model(vp_stage)
            self.config.fill_and_freeze(self.module)

    def on_train_start(self) -> None:
        self._frozen = FrozenMark([self.module])

    def on_train_end(self) -> None:
        """Show that nothing frozen has moved.

        Raises:
            RuntimeError: a frozen parameter has changed (a defect of this package).
        """
        self._frozen.check()


class FlexOlmoOptimizer(MegatronOptimizerModule):
    """Megatron's optimizer. NeMo 2.7.3 itself calls it as core 0.15 had it, which 0.16 refuses."""

    def optimizers(self, model: MegatronParallel) -> list[McoreDistributedOptimizer]:
        """AdamW over what trains; norms and biases do not decay."""
        made = get_megatron_optimizer(self.config, [chunk.module for chunk in model],
                                      get_standard_config_overrides(self.config))
        for group in made.param_groups:  # else Megatron's schedule would, which NeMo does not use
            group["weight_decay"] *= group.get("wd_mult", 1.0)
        return [McoreDistributedOptimizer(made)]

    def finalize_model_grads(self, chunks: list[nn.Module], *args: Any, **options: Any) -> None:
        super().finalize_model_grads(chunks, *args, **options)
        for chunk in chunks:
            hold_biases_at_zero(chunk)


class FlexOlmoData(llm.PreTrainingDataModule):
    """Data sets of `flexolmo data`, with the samples and the order of ``flexolmo train``.

    Args:
        paths: prefixes, as ``data.train`` of ``flexolmo train``; valid, public, public_share and proxies likewise.
        seq_length: tokens per sample.
        micro_batch_size, global_batch_size: samples.
        cache: folder of the sample indices, shared by all processes.
        seed: of the order.
        num_workers: processes per rank that read ahead.
    """

    def __init__(self, paths: list[Any], valid: list[Any] | None = None, public: list[Any] | None = None,
                 public_share: float = 0.0, proxies: dict[str, list[Any]] | None = None, seq_length: int = 4096,
                 micro_batch_size: int = 1, global_batch_size: int = 1024, cache: str = "cache", seed: int = 1234,
                 num_workers: int = 2) -> None:
        LightningDataModule.__init__(self)  # that of PreTrainingDataModule makes a tokenizer, from the network
        self.data = DataConfig(paths, valid or [], public or [], public_share, proxies or {}, seq_length, cache)
        self.seq_length, self.micro_batch_size, self.global_batch_size = seq_length, micro_batch_size, global_batch_size
        self.seed, self.num_workers, self.pin_memory, self.persistent_workers = seed, num_workers, True, num_workers > 0
        self.tokenizer, self.init_global_step = None, 0
        self.data_sampler = MegatronDataSampler(seq_length, micro_batch_size, global_batch_size)

    def setup(self, stage: str = "") -> None:
        """Build the samples; called by all ranks, by Lightning."""
        trainer = self.trainer
        config = TrainConfig(out=".", data=self.data, train_iters=trainer.max_steps, seed=self.seed,
                             global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size,
                             eval_iters=max(1, int(trainer.limit_val_batches)))
        self._train_ds, self._validation_ds, _ = run_datasets(config, trainer.lightning_module.config.card())

    def val_dataloader(self) -> Any:
        return [] if self._validation_ds is None else super().val_dataloader()
