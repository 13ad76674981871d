"""Command-line arguments of a Megatron-LM launch: ours, and the defaults that an anchor gives to Megatron-LM's own.

Whoever takes over an existing launch leaves out what describes the architecture; what they give all the same
must agree.
"""

import argparse
from typing import Any

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import ExpertConfig, TrainConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.planning import plan_expert
from flexolmo_megatron.training.run_plan import Plan

_OLMO2 = dict(
    position_embedding_type="rope",
    rotary_percent=1.0,
    rotary_interleaved=False,
    use_rope_scaling=False,
    group_query_attention=True,
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    add_qkv_bias=False,
    untie_embeddings_and_output_weights=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    qk_layernorm=False,
    multi_latent_attention=False,
)
"""Architecture that all models here share. (qk_layernorm is upstream's norm per head; ours is part of the spec.)"""

_PAIR = dict(
    num_experts=2,
    moe_router_topk=2,
    moe_router_pre_softmax=True,
    moe_router_dtype="fp32",
    moe_router_load_balancing_type="none",
)

_UNSUPPORTED = dict(
    yaml_cfg=None,
    use_legacy_models=False,
    use_megatron_fsdp=False,
    use_torch_fsdp2=False,
    init_model_with_meta_device=False,
    moe_use_upcycling=False,
    overlap_moe_expert_parallel_comm=False,
    mtp_num_layers=None,
    ckpt_format="torch_dist",
)
"""What would build, wrap or store the model in another way, and the value that it must keep."""

_OURS = dict(
    # Upstream's name for it. Checkpoints then have a key per layer, as this package reads them.
    hetereogenous_dist_checkpoint=True,
    create_attention_mask_in_dataloader=False,
)

Required = dict[str, tuple[Any, str]]
"""Argument of Megatron-LM -> the value that it must have, and why."""


def _sizes(model: ModelConfig) -> dict[str, Any]:
    return dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        padded_vocab_size=model.vocab_size,
        rotary_base=model.rotary_base,
        layernorm_epsilon=model.layernorm_epsilon,
    )


def _add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="FlexOlmo")
    group.add_argument("--flexolmo-anchor", metavar="PATH",
                       help="Published anchor: train an expert against it. Without it, a new dense anchor is trained.")
    group.add_argument("--flexolmo-expert", metavar="NAME", default="",
                       help="Name of the expert (needed with an anchor).")
    group.add_argument("--flexolmo-domain-vector", metavar="FILE",
                       help="From `flexolmo embed`: where the router row starts (needed with an anchor).")
    group.add_argument("--flexolmo-no-bias", action="store_true", help="Train no router bias.")
    group.add_argument("--flexolmo-ffn-hidden-size", type=int, metavar="N",
                       help="Inner width of the expert (default: the anchor's).")
    group.add_argument("--flexolmo-router-window", type=int, metavar="N", default=1,
                       help="Positions over which routing logits are averaged (default: %(default)s, the paper's).")
    return parser


class LaunchArguments:
    """``extra_args_provider`` of Megatron-LM's ``pretrain()``; afterwards it knows what the run starts from."""

    def __init__(self) -> None:
        self.config = TrainConfig()
        """What an owner says about the expert."""
        self.plan: Plan | None = None
        """Of an expert; None for a new anchor."""
        self.required: Required = {}

    def __call__(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        ours, _ = _add_options(argparse.ArgumentParser(add_help=False, allow_abbrev=False)).parse_known_args()
        defaults: dict[str, Any] = _OURS | dict(rotary_base=500_000, layernorm_epsilon=1e-6, router_bias=False,
                                                router_window=1)
        self.required = {name: (value, "as all models here have it") for name, value in _OLMO2.items()}
        if ours.flexolmo_anchor is not None:
            self.config.anchor = ours.flexolmo_anchor
            self.config.expert = ExpertConfig(ours.flexolmo_expert, ours.flexolmo_domain_vector,
                                              bias=not ours.flexolmo_no_bias,
                                              ffn_hidden_size=ours.flexolmo_ffn_hidden_size,
                                              router_window=ours.flexolmo_router_window)
            self.plan = plan_expert(self.config)
            pair = self.plan.card.model
            architecture = _sizes(pair) | _PAIR | dict(moe_ffn_hidden_size=pair.ffn_hidden_size)
            self.required |= {name: (value, "as the anchor demands") for name, value in architecture.items()}
            defaults |= dict(
                router_bias=pair.router_bias,
                router_window=pair.router_window,
                anchor_ffn_hidden_size=self.plan.anchor_ffn_hidden_size,
                moe_z_loss_coeff=TrainConfig.moe_z_loss_coeff,
                # Reading .bin/.idx needs no tokenizer; another one may be named.
                tokenizer_type="NullTokenizer",
                vocab_size=pair.vocab_size - 1,
            )
        self.required |= {name: (value, "the only value supported") for name, value in _UNSUPPORTED.items()}
        _add_options(parser)
        parser.set_defaults(**defaults | {name: value for name, (value, _) in self.required.items()})
        return parser

    def check(self, args: argparse.Namespace) -> None:
        """Check Megatron-LM's parsed and validated arguments against what the model must be.

        Raises:
            FlexOlmoError: one has another value.
        """
        for name, (value, reason) in self.required.items():
            found = getattr(args, name)
            if found != value:
                raise FlexOlmoError(f"Megatron-LM's argument {name} = {found}: expected {value}, {reason}; "
                                    "leave the option out")


def dense_card(args: argparse.Namespace) -> ModelCard:
    """The card of a new anchor, from the arguments of its launch."""
    sizes = {name: getattr(args, name) for name in _sizes(ModelConfig())}
    del sizes["kv_channels"]
    sizes["vocab_size"] = sizes.pop("padded_vocab_size")
    model = ModelConfig(**sizes, init_method_std=args.init_method_std)
    if args.kv_channels != model.head_dim:
        raise FlexOlmoError(f"Megatron-LM's argument kv_channels = {args.kv_channels}: expected hidden_size / "
                            f"num_attention_heads = {model.head_dim}; leave the option out")
    card = ModelCard("dense", model)
    if args.tokenizer_type == "HuggingFaceTokenizer":
        card.tokenizer = {"type": "huggingface", "path": args.tokenizer_model}
    return card
