"""The published anchor: what a coordinator gives to data owners.

It is the dense public model as a FlexOlmo model with one expert, ``public``, whose router row is the domain vector of
the public documents. So the anchor's digest, which every expert package names, covers that row.
``convert/variants.as_dense`` is the way back.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import torch

from flexolmo_megatron.config.card import PUBLIC, ExpertRecord
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.names import expected_tensors
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.domain.vector import DomainVector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest

_ROW = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")


def dense_digest(anchor: LazyModel) -> str:
    """Return the digest of an anchor's weights without its router row: equal before and after publication.

    Raises:
        FlexOlmoError: the model has several experts.
    """
    return model_digest(as_dense(anchor))


def publish_anchor(dense: LazyModel, vector: DomainVector) -> LazyModel:
    """Return the one-expert model of ``dense`` whose router rows are those of ``vector``, in the model's own dtype.

    Nothing is read from ``dense`` until the result is. Whether the vector was made with this very model is for the
    caller to know: compare ``vector.dense_digest``.

    Raises:
        FlexOlmoError: the model has experts already, or the vector does not fit it or is itself centred.
    """
    card = dense.card
    if card.kind != "dense":
        raise FlexOlmoError(f"only a dense model can be published as an anchor, this is a {card.kind} model with the "
                            f"experts {', '.join(card.expert_names)}")
    if vector.centred:
        raise FlexOlmoError("a centred domain vector is a difference from an anchor's rows: expected one that is not")
    vector.check_fits(card.model.num_layers, card.model.hidden_size, "the domain vector")
    config = replace(card.model, num_experts=1, top_k=1)
    tensors = {}
    for name in expected_tensors(config, "moe"):
        if row := _ROW.fullmatch(name):
            layer = int(row[1])
            dtype = dense.tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].dtype
            tensors[name] = LazyTensor(
                dtype, (1, config.hidden_size),
                lambda layer=layer, dtype=dtype: torch.tensor(vector.row(layer)).to(dtype)[None])
        else:
            tensors[name] = dense.tensors[name.replace(".mlp.experts.0.", ".mlp.")]
    public = ExpertRecord(PUBLIC, router=vector.record())
    return LazyModel(replace(card, kind="moe", model=config, experts=[public], anchor_digest=None), tensors)


def public_rows(anchor: LazyModel) -> torch.Tensor | None:
    """Return the router rows fp32 `[L, h]` of a published anchor; None for a dense model."""
    if anchor.card.kind == "dense":
        return None
    rows = [anchor.tensors[f"model.layers.{layer}.mlp.gate.weight"].read()[0]
            for layer in range(anchor.card.model.num_layers)]
    return torch.stack(rows).float()


class OwnerRouter(NamedTuple):
    """Where an owner's router starts, beside a published anchor's; fp32."""

    rows: torch.Tensor
    """`[L, h]`, or `[1, h]` for all layers."""
    biases: torch.Tensor
    """`[L]`, or `[1]` for all layers; 0, but for discriminants."""
    moments: torch.Tensor | None = None
    """``DomainVector.moments``."""

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row `[h]` and the bias `[]` of a layer, from 0."""
        place = self._place(layer)
        return self.rows[place], self.biases[place]

    def moments_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's mean state of the owner's documents and the deviation of public ones, both `[h]`."""
        mean_h, deviation_h = self.moments[:, self._place(layer)]
        return mean_h, deviation_h

    def _place(self, layer: int) -> int:
        return layer if len(self.rows) > 1 else 0


def owner_router(vector: DomainVector, anchor: LazyModel) -> OwnerRouter:
    """Return what a domain vector makes of an owner's router."""
    rows = torch.from_numpy(vector.vectors)
    biases = torch.zeros(len(rows)) if vector.biases is None else torch.from_numpy(vector.biases)
    moments = None if vector.moments is None else torch.from_numpy(vector.moments)
    return OwnerRouter(public_rows(anchor) + rows if vector.centred else rows, biases, moments)
