"""The coupled pair of anchor-coupled training: both FFNs run on every token, nothing is dispatched.

With two of two experts active (arXiv 2507.07024, section 3.1) a sparse layer would permute all tokens twice for
nothing, and its stacked weights could not be frozen by half. Here the anchor is an ordinary frozen MLP: it computes
input gradients only and has no gradient buffer and no optimizer state.
"""

import contextlib
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from flexolmo_megatron.model.config import FlexOlmoTransformerConfig
from flexolmo_megatron.model.ffn import GatedFFN


@dataclass
class CoupledPairSubmodules:
    """What a coupled pair is built from."""

    mlp: MLPSubmodules
    """Linear layers of both FFNs."""
    router: ModuleSpec | type
    """The router of the two."""


class CoupledPair(MegatronModule):
    """`p_pub * anchor(x) + p_i * expert(x)`, with p the softmax over the two routing logits.

    Args:
        config: ffn_hidden_size is the owner's width, anchor_ffn_hidden_size the anchor's (None: the same).
        submodules: linear layers and router.
    """

    alone = False
    """Whether the owner's expert and the router are left out; set by ``anchor_alone``."""

    def __init__(
        self,
        config: FlexOlmoTransformerConfig,
        submodules: CoupledPairSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or get_default_pg_collection()
        anchor_config = copy(config)
        anchor_config.ffn_hidden_size = config.anchor_ffn_hidden_size or config.ffn_hidden_size
        self.anchor = GatedFFN(
            anchor_config, submodules.mlp, ffn_hidden_size=anchor_config.ffn_hidden_size, tp_group=groups.tp
        )
        self.expert = GatedFFN(config, submodules.mlp, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)
        self.router = build_module(submodules.router, config=config, pg_collection=groups)

    def set_layer_number(self, layer_number: int) -> None:
        """Tell the router which layer it is in (1-based), for its z-loss record."""
        self.router.set_layer_number(layer_number)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Map `[s, b, h]` to `[s, b, h]`; the second value is the absent bias."""
        if self.alone:
            return self.anchor(hidden_states)
        share = self.router(hidden_states, padding_mask).to(hidden_states.dtype)
        anchor_output, _ = self.anchor(hidden_states)
        expert_output, _ = self.expert(hidden_states)
        return anchor_output.lerp(expert_output, share), None


@contextlib.contextmanager
def anchor_alone(model: nn.Module) -> Iterator[None]:
    """Let forward passes of a pair within the block be those of its anchor: no expert, no router, no router loss."""
    pairs = [module for module in model.modules() if isinstance(module, CoupledPair)]
    try:
        for pair in pairs:
            pair.alone = True
        yield
    finally:
        for pair in pairs:
            pair.alone = False
