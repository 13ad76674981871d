"""The architecture of a model: what every checkpoint, package and config file says about it."""

from dataclasses import dataclass, fields, replace
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError, nearest

MAX_ROUTER_WINDOW = 65_536
"""Longer windows would only cost: no text needs them."""
UNHASHED = ("num_attention_heads", "num_query_groups", "rotary_base", "layernorm_epsilon")
"""Fields of ``ModelConfig`` that change what the same tensors compute, so that a digest alone does not name a model."""


@dataclass
class ModelConfig:
    """Sizes and constants of an OLMo-2-style decoder, dense or FlexOlmo (design: arXiv 2507.07024, section 3)."""

    num_layers: int = 4
    """Number of decoder layers."""
    hidden_size: int = 128
    """Width of the residual stream (h)."""
    ffn_hidden_size: int = 344
    """Inner width of one feed-forward network, that is of one expert."""
    num_attention_heads: int = 4
    """Query heads; must divide hidden_size."""
    num_query_groups: int = 4
    """Key/value heads; equal to num_attention_heads for MHA, a divisor of it for grouped-query attention."""
    vocab_size: int = 257
    """Rows of the embedding and of the output layer (not padded: must be divisible by the tensor-parallel size)."""
    max_position_embeddings: int = 512
    """Longest sequence, in tokens."""
    rotary_base: float = 500_000.0
    """RoPE theta."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of every RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights of a newly trained anchor."""
    num_experts: int = 0
    """Experts per layer; 0 for a dense model. Expert 0 is the public anchor's."""
    top_k: int = 0
    """Experts that are active for each token; 0 for a dense model."""
    router_bias: bool = False
    """Whether the router has a bias per expert, used as min(bias, 0); the anchor's is 0."""
    router_window: int = 1
    """Positions over which routing logits are averaged: a token's own and those before it. 1 is the paper's router."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def validate(self) -> None:
        """Check that the sizes fit together.

        Raises:
            FlexOlmoError: a size is impossible; the message names the field, its value and what was expected.
        """
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "vocab_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise FlexOlmoError(f"model.{name} = {getattr(self, name)}: expected a number of at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise FlexOlmoError(
                f"model.num_attention_heads = {self.num_attention_heads} does not divide "
                f"model.hidden_size = {self.hidden_size}"
            )
        if self.head_dim % 2:
            raise FlexOlmoError(
                f"model.hidden_size / model.num_attention_heads = {self.head_dim}: RoPE needs an even head size"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise FlexOlmoError(
                f"model.num_query_groups = {self.num_query_groups} does not divide "
                f"model.num_attention_heads = {self.num_attention_heads}"
            )
        if self.num_experts < 0 or self.top_k < 0:
            raise FlexOlmoError(
                f"model.num_experts = {self.num_experts}, model.top_k = {self.top_k}: expected 0 or more"
            )
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise FlexOlmoError(f"model.top_k = {self.top_k}: expected 1 to model.num_experts = {self.num_experts}")
        if not self.num_experts and (self.top_k or self.router_bias or self.router_window != 1):
            raise FlexOlmoError("model.top_k, model.router_bias and model.router_window need model.num_experts > 0")
        if not 1 <= self.router_window <= MAX_ROUTER_WINDOW:
            raise FlexOlmoError(f"model.router_window = {self.router_window}: expected 1 to {MAX_ROUTER_WINDOW}")

    def dense(self) -> "ModelConfig":
        """Return the architecture without experts."""
        return replace(self, num_experts=0, top_k=0, router_bias=False, router_window=1)

    def pair(
        self, width: int | None, router_bias: bool, router_window: int, whose: str = "the anchor's"
    ) -> "ModelConfig":
        """Return the architecture of the coupled model in which an owner trains, beside an anchor of this one.

        Args:
            width: ffn_hidden_size of the owner's expert; None for the anchor's.
            router_bias: whether the owner's row has a bias.
            router_window: positions over which the logits are averaged.
            whose: begins what a refusal says of the anchor's width.

        Raises:
            FlexOlmoError: the expert is wider than the anchor's FFN, or its width is below 1.
        """
        width = width or self.ffn_hidden_size
        if not 1 <= width <= self.ffn_hidden_size:
            raise FlexOlmoError(f"expert.ffn_hidden_size = {width}: expected 1 to {whose} {self.ffn_hidden_size}")
        return replace(
            self, num_experts=2, top_k=2, ffn_hidden_size=width, router_bias=router_bias, router_window=router_window
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "ModelConfig":
        """Build from a parsed JSON object; ``where`` names the file in an error.

        Raises:
            FlexOlmoError: an unknown key, a wrong type or an impossible size.
        """
        known = {field.name: field.type for field in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise FlexOlmoError(f"{where}: unknown model field {key!r}{nearest(key, known)}")
            expected = {int: (int,), float: (int, float), bool: (bool,)}[known[key]]
            if not isinstance(value, expected) or (isinstance(value, bool) and known[key] is not bool):
                raise FlexOlmoError(f"{where}: model field {key} = {value!r}: expected {known[key].__name__}")
        try:
            return cls(**values)
        except FlexOlmoError as error:
            raise FlexOlmoError(f"{where}: {error}") from None
