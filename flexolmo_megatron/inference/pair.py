"""The two-expert model that an owner trained: the published anchor and the owner's pair checkpoint, side by side.

Unlike a merge of packages it needs no package: for an owner who looks at a run before handing anything over.
"""

import os
from dataclasses import replace

import torch

from flexolmo_megatron.config.model import UNHASHED
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor, padded
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.names import expected_tensors
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest


def open_anchor(pair: LazyModel, path: str | os.PathLike | None = None) -> LazyModel:
    """Open the anchor that ``pair`` was trained against, and check that it is that one (reads all of it).

    Args:
        pair: of kind pair.
        path: where the anchor is now; None for where it was when the pair was trained.

    Raises:
        FlexOlmoError: there is no anchor, or another one.
    """
    path = path or pair.card.anchor_path
    if path is None:
        raise FlexOlmoError("the pair's card has no anchor_path: name the anchor that it was trained against")
    try:
        anchor = open_model(path)
    except FlexOlmoError as error:
        raise FlexOlmoError(f"a pair needs the anchor that it was trained against: {error}") from error
    if anchor.card.kind != "moe" or anchor.card.model.num_experts != 1:
        raise FlexOlmoError(f"{path} is a {anchor.card.kind} model with {anchor.card.model.num_experts} experts: "
                            "expected the pair's anchor, a moe model with one expert")
    digest = model_digest(anchor)
    if digest != pair.card.anchor_digest:
        raise FlexOlmoError(f"{path} has the digest {digest}: expected the pair's anchor, {pair.card.anchor_digest}")
    for field in UNHASHED:
        found, expected = getattr(anchor.card.model, field), getattr(pair.card.model, field)
        if found != expected:
            raise FlexOlmoError(f"{path} has {field} = {found}: the pair was trained with {expected}")
    return anchor


def _joined(first: LazyTensor, second: LazyTensor) -> LazyTensor:
    dtype = torch.promote_types(first.dtype, second.dtype)
    return LazyTensor(dtype, (first.shape[0] + second.shape[0], *first.shape[1:]),
                      lambda: torch.cat([first.read().to(dtype), second.read().to(dtype)]))


def couple(anchor: LazyModel, pair: LazyModel) -> LazyModel:
    """Compose the merged model of one owner, kind moe, two experts that are both active.

    Args:
        anchor: the published anchor, with one expert.
        pair: what the owner trained.
    """
    config = anchor.card.model.pair(None, pair.card.model.router_bias, pair.card.model.router_window)
    tensors = dict(anchor.tensors)
    for name, tensor in pair.tensors.items():
        if name.endswith(".mlp.gate.weight"):
            tensors[name] = _joined(anchor.tensors[name], tensor)
        elif name.endswith(".mlp.gate.bias"):
            tensors[name] = _joined(LazyTensor(torch.float32, (1,), lambda: torch.zeros(1)), tensor)
        else:
            tensors[name] = padded(tensor, anchor.tensors[name.replace(".experts.1.", ".experts.0.")].shape)
    # The pair's card knows the anchor's tokenizer where it was in training; the anchor may have moved with it since.
    card = replace(pair.card, kind="moe", model=config, tokenizer=anchor.card.tokenizer, anchor_path=None)
    return LazyModel(card, {name: tensors[name] for name in expected_tensors(config, "moe")})
