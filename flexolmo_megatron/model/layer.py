"""The decoder layer with OLMo 2's reordered norm: no norm before a sub-block, RMSNorm on its output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig


@dataclass
class FlexOlmoLayerSubmodules(TransformerLayerSubmodules):
    """Megatron's submodules and the two norms on the sub-blocks' outputs."""

    post_self_attn_layernorm: ModuleSpec | type = IdentityOp
    post_mlp_layernorm: ModuleSpec | type = IdentityOp


def _normed(norm: nn.Module, add: Callable) -> Callable:
    """Wrap a bias-dropout-add factory so that ``norm`` is applied to the sub-block's output before it is added."""

    def factory(training: bool, fused: bool) -> Callable:
        bias_dropout_add = add(training, fused)

        def norm_then_add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            # Linear layers have no bias here, so norm(output + bias) is norm(output).
            assert bias is None
            return bias_dropout_add((norm(output), None), residual, dropout)

        return norm_then_add

    return factory


class FlexOlmoLayer(TransformerLayer):
    """Megatron's layer: the place between a sub-block and its residual addition is the bias-dropout-add function."""

    def __init__(
        self,
        config: FlexOlmoTransformerConfig,
        submodules: FlexOlmoLayerSubmodules,
        layer_number: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        norm = dict(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.post_self_attn_layernorm = build_module(submodules.post_self_attn_layernorm, **norm)
        self.post_mlp_layernorm = build_module(submodules.post_mlp_layernorm, **norm)
        self.self_attn_bda = _normed(self.post_self_attn_layernorm, self.self_attn_bda)
        self.mlp_bda = _normed(self.post_mlp_layernorm, self.mlp_bda)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's, but that a router's window needs whole sequences, each by itself.

        Raises:
            FlexOlmoError: one pass has only the newest positions of sequences, or several sequences in one.
        """
        router = getattr(self.mlp, "router", None)
        if router is not None and self.config.router_window > 1:
            cached = kwargs.get("inference_context") is not None and router.history is None
            if cached or kwargs.get("packed_seq_params") is not None:
                raise FlexOlmoError(f"router_window = {self.config.router_window} with "
                                    f"{'a key/value cache' if cached else 'packed sequences'}: expected 1; "
                                    "flexolmo_megatron.load_model generates with a window")
        return super().forward(*args, **kwargs)
