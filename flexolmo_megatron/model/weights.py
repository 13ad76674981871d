"""Between a live Megatron model, possibly sharded, and the canonical tensors of a ``LazyModel``.

What a rank holds is read off Megatron's own ``sharded_state_dict``, so every layout that it can checkpoint is covered.
Which canonical tensors fill a region is read off ``convert/names.py``. Optimizer state is not covered: an optimizer
with fp32 master weights must reload them after ``load_weights``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.names import (
    Box,
    MegatronTensor,
    check_tensors,
    expected_tensors,
    fill_region,
    megatron_tensors,
    pieces_in,
    slices,
)
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.pair import CoupledPair

Chunks = GPTModel | list[GPTModel]
"""A model, or its virtual pipeline stages; wrappers (DDP, Float16Module) are looked through."""

# Parts of a pair model's keys. The anchor's become those of the one-expert model that the anchor is on disk.
_OWNER = (".mlp.expert.", ".mlp.router.row", ".mlp.router.bias")
_ANCHOR = {".mlp.anchor.": ".mlp.experts.experts.", ".mlp.router.public_row": ".mlp.router.weight"}


@dataclass(frozen=True)
class _Shard:
    """A rectangular part of one Megatron tensor that this rank holds."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    data: torch.Tensor
    """The live parameter, or a view of it: writing here changes the model."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1,) * (len(self.shape) - self.data.ndim) + tuple(self.data.shape)

    @property
    def region(self) -> Box:
        return tuple((first, first + size) for first, size in zip(self.offset, self.sizes, strict=True))


def _is_pair(model: Chunks) -> bool:
    chunks = model if isinstance(model, list) else [model]
    return any(isinstance(module, CoupledPair) for chunk in chunks for module in chunk.modules())


def _all_shards(model: Chunks) -> Iterator[_Shard]:
    for chunk in unwrap_model(model if isinstance(model, list) else [model]):
        for entry in chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
            parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            for part in parts:
                if isinstance(part, ShardedTensor):  # else Transformer Engine's extra state, which holds no weight
                    yield _Shard(part.key, tuple(part.global_shape), tuple(part.global_offset), part.data)


def _shards(model: Chunks, card: ModelCard) -> list[_Shard]:
    """What this rank holds of the tensors that ``card`` describes: of a pair model, either part."""
    shards = list(_all_shards(model))
    if not _is_pair(model):
        return shards
    if card.kind == "pair":
        return [shard for shard in shards if any(part in shard.key for part in _OWNER)]
    anchors = []
    for shard in shards:
        if any(part in shard.key for part in _OWNER):
            continue
        for here, on_disk in _ANCHOR.items():
            shard = replace(shard, key=shard.key.replace(here, on_disk))
        if ".experts." in shard.key:  # the only expert of the stacked tensor
            shard = replace(shard, shape=(1, *shard.shape), offset=(0, *shard.offset))
        anchors.append(shard)
    return anchors


def _keys_of_all_stages(shards: list[_Shard]) -> dict[str, tuple[int, ...]]:
    """Key -> global shape over the pipeline stages; ranks of one stage hold parts of the same tensors."""
    keys = {shard.key: shard.shape for shard in shards}
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1:
        return keys
    gathered: list[dict[str, tuple[int, ...]]] = [{}] * stages
    torch.distributed.all_gather_object(gathered, keys, group=parallel_state.get_pipeline_model_parallel_group())
    return {key: shape for stage in gathered for key, shape in stage.items()}


def _check_keys(live: dict[str, tuple[int, ...]], stored: dict[str, MegatronTensor], card: ModelCard) -> None:
    for key, shape in live.items():
        if key not in stored:
            raise FlexOlmoError(f"nothing in the given {card.kind} model fills the tensor {key} of the running model")
        if shape != stored[key].shape:
            raise FlexOlmoError(
                f"tensor {key} has shape {list(shape)} in the running model "
                f"and {list(stored[key].shape)} in the given {card.kind} model"
            )
    for key in stored:
        if key not in live:
            raise FlexOlmoError(f"the running model has no place for the tensor {key} of the given {card.kind} model")


@torch.no_grad()
def load_weights(model: Chunks, lazy: LazyModel) -> None:
    """Copy the tensors of ``lazy`` into a live model, each rank its own part; types are converted where they differ.

    A pair model takes either its owner's tensors (card.kind "pair") or its anchor's (see ``load_anchor``).

    Args:
        model: from ``build_model``, for the kind and architecture of ``lazy``.
        lazy: read one tensor at a time.

    Raises:
        FlexOlmoError: a tensor of the model stays unfilled, one of ``lazy`` is not used, or shapes differ; on every
            rank alike, and before anything is copied.
    """
    check_tensors(lazy.tensors, expected_tensors(lazy.card.model, lazy.card.kind), f"{lazy.card.kind} model")
    stored = megatron_tensors(lazy.card.model, lazy.card.kind)
    shards = _shards(model, lazy.card)
    _check_keys(_keys_of_all_stages(shards), stored, lazy.card)
    for shard in shards:
        filled = fill_region(stored[shard.key], shard.offset, shard.sizes, lazy.tensors, shard.data.dtype)
        shard.data.copy_(filled.view_as(shard.data))


def load_anchor(pair_model: Chunks, anchor: LazyModel) -> None:
    """Fill everything of a pair model that does not belong to the owner: all frozen parameters.

    Args:
        pair_model: of kind pair.
        anchor: the published anchor, a FlexOlmo model with one expert.

    Raises:
        FlexOlmoError: ``anchor`` is not such a model, or does not fit.
    """
    if anchor.card.kind != "moe" or anchor.card.model.num_experts != 1:
        raise FlexOlmoError(
            f"the anchor is a {anchor.card.kind} model with {anchor.card.model.num_experts} experts: "
            "expected a published anchor, a moe model with one expert"
        )
    load_weights(pair_model, anchor)


def _narrow(tensor: LazyTensor, dimension: int, width: int) -> LazyTensor:
    shape = tuple(width if index == dimension else size for index, size in enumerate(tensor.shape))
    return LazyTensor(tensor.dtype, shape, lambda: tensor.read().narrow(dimension, 0, width).contiguous())


@torch.no_grad()
def init_expert_from_anchor(pair_model: Chunks, anchor: LazyModel) -> None:
    """Start the owner's expert as a copy of the anchor's FFN (arXiv 2507.07024, section 3.1).

    A narrower expert gets the first of the anchor's inner units.

    Args:
        pair_model: of kind pair.
        anchor: the published anchor, a FlexOlmo model with one expert.

    Raises:
        FlexOlmoError: the expert is wider than the anchor's FFN.
    """
    shards = [shard for shard in _all_shards(pair_model) if ".mlp.expert." in shard.key]
    fc2 = next(shard for shard in shards if shard.key.endswith("linear_fc2.weight"))
    width, anchor_width = fc2.shape[1], anchor.card.model.ffn_hidden_size
    if width > anchor_width:
        raise FlexOlmoError(
            f"model.ffn_hidden_size = {width} of the expert: to start as a copy of the anchor's FFN it "
            f"must be at most the anchor's, {anchor_width}"
        )
    stored = megatron_tensors(replace(anchor.card.model, ffn_hidden_size=width, num_experts=2, top_k=2), "pair")
    tensors = {
        name.replace(".experts.0.", ".experts.1."): _narrow(tensor, 1 if "down_proj" in name else 0, width)
        for name, tensor in anchor.tensors.items()
        if ".experts.0." in name
    }
    for shard in shards:
        shard.data.copy_(fill_region(stored[shard.key], shard.offset, shard.sizes, tensors, shard.data.dtype))


def live_model(model: Chunks, card: ModelCard) -> LazyModel:
    """View the tensors of an unsharded live model under their canonical names: for its digest, or to write it out.

    Args:
        model: on one process; reading a tensor copies the weights of that moment to the CPU.
        card: what the model is. For a pair model, its own card selects the owner's tensors and the anchor's card the
            anchor's.

    Raises:
        FlexOlmoError: the card does not fit the model.
    """
    stored = megatron_tensors(card.model, card.kind)
    shards = _shards(model, card)
    _check_keys({shard.key: shard.shape for shard in shards}, stored, card)
    parts: dict[str, list[tuple[Box, torch.Tensor]]] = {}
    for shard in shards:
        for name, canonical, place in pieces_in(stored[shard.key], shard.region):
            data = shard.data.detach().view(shard.sizes)[slices(place, shard.region)]
            parts.setdefault(name, []).append((canonical, data))
    shapes = expected_tensors(card.model, card.kind)
    return LazyModel(card, {name: _assembled(name, shape, parts[name]) for name, shape in shapes.items()})


def _assembled(name: str, shape: tuple[int, ...], parts: list[tuple[Box, torch.Tensor]]) -> LazyTensor:
    assert sum(data.numel() for _, data in parts) == torch.Size(shape).numel(), f"{name} is sharded over processes"

    def read() -> torch.Tensor:
        result = torch.empty(shape, dtype=parts[0][1].dtype)
        for canonical, data in parts:
            target = result[slices(canonical)]
            target.copy_(data.reshape(target.shape))
        return result

    return LazyTensor(parts[0][1].dtype, shape, read)
