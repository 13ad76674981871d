"""``config.json`` of a Hugging Face Olmo2 or FlexOlmo model against our ModelConfig, in both directions.

Reads what transformers 4.57 and 5.x write (rope_theta at the top level or in rope_parameters; dtype or torch_dtype)
and writes one file that both read. Whatever our model would compute differently is refused.
"""

import math
from typing import Any

import torch

from flexolmo_megatron.config.card import Kind
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.errors import FlexOlmoError

MODEL_TYPES: dict[str, Kind] = {"olmo2": "dense", "flex_olmo": "moe"}

_ARCHITECTURES: dict[Kind, tuple[str, str]] = {
    "dense": ("olmo2", "Olmo2ForCausalLM"), "moe": ("flex_olmo", "FlexOlmoForCausalLM")}

_OMITTED: dict[str, dict[str, float]] = {
    "olmo2": {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0},
    "flex_olmo": {"rms_norm_eps": 1e-6, "rope_theta": 500_000.0},
}
"""What transformers takes where config.json leaves a key out."""

_FIXED: dict[str, Any] = {
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "norm_topk_prob": False,
    "quantization_config": None, "sliding_window": None,
}
"""Keys with only one value that this architecture can express; also what an absent key means."""

_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}

SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def _number(values: dict[str, Any], key: str, where: str, kind: type = int) -> Any:
    value = values.get(key)
    accepted = (int, float) if kind is float else (int,)
    if not isinstance(value, accepted) or isinstance(value, bool) or not 0 < value < math.inf:
        raise FlexOlmoError(f"{where}: {key} = {value!r}: expected a positive "
                            f"{'number' if kind is float else 'integer'}")
    return kind(value)


def _rope_theta(values: dict[str, Any], where: str) -> float:
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = values.get(key) or {}
        if not isinstance(found, dict):
            raise FlexOlmoError(f"{where}: {key} = {found!r}: expected an object or null")
        for option, value in found.items():
            if option != "rope_theta" and _PLAIN_ROPE.get(option) != value:
                raise FlexOlmoError(f"{where}: {key}.{option} = {value!r}: expected plain RoPE, without scaling")
        rope |= found
    top, nested = values.get("rope_theta"), rope.get("rope_theta")
    if None not in (top, nested) and top != nested:
        raise FlexOlmoError(f"{where}: rope_theta = {top!r} but rope_parameters.rope_theta = {nested!r}: expected the "
                            "same number in both")
    theta = next(value for value in (top, nested, _OMITTED[values["model_type"]]["rope_theta"]) if value is not None)
    return _number({"rope_theta": theta}, "rope_theta", where, float)


def parse_config(values: Any, where: str) -> tuple[ModelConfig, Kind]:
    """Read the architecture from a parsed ``config.json``; ``where`` names the file in an error.

    Raises:
        FlexOlmoError: another model_type, a missing or impossible size, or an option that the model here does not have
            (tied embeddings, biases, RoPE scaling, renormalised routing, quantised weights).
    """
    found = values.get("model_type") if isinstance(values, dict) else values
    if not isinstance(values, dict) or not isinstance(found, str) or found not in MODEL_TYPES:
        raise FlexOlmoError(f"{where}: model_type {found!r}: expected one of {', '.join(MODEL_TYPES)}")
    model_type = values["model_type"]
    kind = MODEL_TYPES[model_type]
    for key, only in _FIXED.items():
        if values.get(key, only) != only:
            raise FlexOlmoError(f"{where}: {key} = {values[key]!r}: expected {only!r}, the only value that this "
                                "architecture has")
    experts = {}
    if kind == "moe":
        if "num_experts" not in values and "num_local_experts" in values:
            values = {**values, "num_experts": values["num_local_experts"]}
        experts = {"num_experts": _number(values, "num_experts", where),
                   "top_k": _number(values, "num_experts_per_tok", where)}
    heads = _number(values, "num_attention_heads", where)
    groups = heads if values.get("num_key_value_heads") is None else _number(values, "num_key_value_heads", where)
    try:
        config = ModelConfig(
            num_layers=_number(values, "num_hidden_layers", where),
            hidden_size=_number(values, "hidden_size", where),
            ffn_hidden_size=_number(values, "intermediate_size", where),
            num_attention_heads=heads,
            num_query_groups=groups,
            vocab_size=_number(values, "vocab_size", where),
            max_position_embeddings=_number(values, "max_position_embeddings", where),
            rotary_base=_rope_theta(values, where),
            layernorm_epsilon=_number({**_OMITTED[model_type], **values}, "rms_norm_eps", where, float),
            init_method_std=_number({"initializer_range": 0.02, **values}, "initializer_range", where, float),
            **experts,
        )
    except FlexOlmoError as error:
        raise error if str(error).startswith(where) else FlexOlmoError(f"{where}: {error}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise FlexOlmoError(f"{where}: head_dim = {values['head_dim']!r}: expected hidden_size / num_attention_heads = "
                            f"{config.head_dim}")
    return config, kind


def render_config(config: ModelConfig, kind: Kind, dtype: torch.dtype,
                  special_tokens: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a ``config.json`` that transformers 4.57 and 5.x both read.

    Args:
        config: the architecture.
        kind: dense or moe.
        dtype: of the weights.
        special_tokens: values for SPECIAL_TOKENS; absent ones are written as null, because the defaults of transformers
            are ids that a small vocabulary does not have.

    Raises:
        FlexOlmoError: the model has a router_window.
    """
    if config.router_window != 1:
        raise FlexOlmoError(f"the model's routing logits are averaged over {config.router_window} positions, which the "
                            "Hugging Face format has no place for: expected router_window = 1; keep this model as a "
                            "Megatron checkpoint")
    model_type, architecture = _ARCHITECTURES[kind]
    dtype_name = str(dtype).removeprefix("torch.")
    values = {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **{key: special_tokens.get(key) for key in SPECIAL_TOKENS},
        "dtype": dtype_name,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_method_std,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_query_groups,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_parameters": {"rope_theta": config.rotary_base, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": config.rotary_base,
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if kind == "moe":
        values |= {"norm_topk_prob": False, "num_experts": config.num_experts, "num_experts_per_tok": config.top_k,
                   "output_router_logits": False, "router_aux_loss_coef": 0.01}
    return dict(sorted(values.items()))
