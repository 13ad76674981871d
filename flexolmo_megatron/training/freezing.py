"""Freezing everything that came from the anchor, or all but the router, before DDP and optimizer see the model.

Megatron's DistributedDataParallel and optimizer pass over parameters that need no gradient, so a frozen one has no
gradient buffer and no optimizer state, and its linear layers compute input gradients only (LinearWithFrozenWeight).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn

TRAINED_BY_OWNER = re.compile(r"(^|\.)mlp\.(expert\..*|router\.(row|bias))$")
"""Names, within a pair model, of what an owner trains; everything else is the anchor's."""
ROUTER = re.compile(r"(^|\.)mlp\.router\.(weight|bias)$")
"""Names, within a merged model, of router rows and biases."""


def freeze_anchor(model: nn.Module) -> None:
    """Let only the owner's expert, router row and bias of a pair model train.

    Raises:
        ValueError: the model has none of these.
    """
    _train_only(model, TRAINED_BY_OWNER, "not a pair model: no parameter of an owner's expert was found")


def freeze_all_but_router(model: nn.Module) -> None:
    """Let only the router rows and biases of a merged model train.

    Raises:
        ValueError: the model has none of these.
    """
    _train_only(model, ROUTER, "not a merged model: no router was found")


def _train_only(model: nn.Module, names: re.Pattern[str], otherwise: str) -> None:
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names.search(name) is not None)
        trained += parameter.requires_grad
    if not trained:
        raise ValueError(otherwise)


def frozen_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of everything that does not train."""
    return ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)


def frozen_fingerprint(model: nn.Module) -> str:
    """sha256 over this rank's frozen parameters: equal before and after a run if, and only if, no bit has moved."""
    digest = hashlib.sha256()
    for name, parameter in frozen_parameters(model):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class FrozenMark:
    """What a model's frozen parameters are now, to show later that no bit of them has moved."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._chunks = chunks
        self._before = self._fingerprints()

    def _fingerprints(self) -> list[str]:
        return [frozen_fingerprint(chunk) for chunk in self._chunks]

    def check(self) -> None:
        """Compare.

        Raises:
            RuntimeError: a frozen parameter has changed (a defect of this package).
        """
        if self._fingerprints() != self._before:
            raise RuntimeError(f"a frozen parameter has changed on rank {torch.distributed.get_rank()}")
