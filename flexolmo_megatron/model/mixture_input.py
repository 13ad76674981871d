"""What stands before a mixture's experts, where other models have a norm."""

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class MixtureInput(IdentityOp):
    """Passes the hidden states on, such that the router below gets its gradient.

    Transformer Engine's fused permutation (2.10 to 2.14, pytorch/permutation.py, _moe_permute_mask_map.backward) gives
    the routing probabilities a gradient only where the hidden states need one. In the first layer of router tuning,
    above frozen weights alone, they do not. An IdentityOp, so that Megatron does not try to compute a norm anew.
    """

    def __init__(self, config: TransformerConfig, **norm: Any) -> None:
        super().__init__()
        self.fused = config.moe_permute_fusion

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `[s, b, h]` as it is, needing a gradient where anything may get one."""
        if self.fused and torch.is_grad_enabled() and not hidden.requires_grad:
            return hidden.detach().requires_grad_()
        return hidden
