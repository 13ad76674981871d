"""Which part of which Megatron tensor holds which canonical (Hugging Face) tensor: the table behind every conversion.

Used on whole files by ``convert/megatron.py`` and on parts of live, sharded parameters by training code: given a
Megatron key and a region of its global tensor, ``pieces_in`` and ``fill_region`` say which canonical tensors fill it.

Letters: V vocabulary, h hidden size, f ffn_hidden_size, E experts, q query rows (= h), k key rows (= value rows).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from flexolmo_megatron.config.card import Kind
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.lazy import LazyTensor
from flexolmo_megatron.errors import FlexOlmoError

Box = tuple[tuple[int, int], ...]
"""A region of a tensor: (first, past-the-last) index in each dimension."""


@dataclass(frozen=True)
class Rule:
    """One row of the table: a Megatron tensor and the canonical tensors that it is made of, stacked along rows."""

    key: str
    """Megatron key; {l} is the layer."""
    parts: dict[str, str]
    """Canonical name ({l} layer, {e} expert) -> its shape in letters; {e} adds an expert axis in front."""
    interleaved: bool = False
    """Rows of the parts alternate by query group, as in Megatron's fused q/k/v, instead of one part after the other."""
    only_with_bias: bool = False
    """Exists only where config.router_bias is set."""


_LAYER, _HF_LAYER = "decoder.layers.{l}.", "model.layers.{l}."

_BACKBONE = (
    Rule("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "Vh"}),
    Rule(_LAYER + "self_attention.linear_qkv.weight", {
        _HF_LAYER + "self_attn.q_proj.weight": "qh",
        _HF_LAYER + "self_attn.k_proj.weight": "kh",
        _HF_LAYER + "self_attn.v_proj.weight": "kh",
    }, interleaved=True),
    Rule(_LAYER + "self_attention.linear_proj.weight", {_HF_LAYER + "self_attn.o_proj.weight": "hq"}),
    Rule(_LAYER + "self_attention.q_layernorm.weight", {_HF_LAYER + "self_attn.q_norm.weight": "q"}),
    Rule(_LAYER + "self_attention.k_layernorm.weight", {_HF_LAYER + "self_attn.k_norm.weight": "k"}),
    Rule(_LAYER + "post_self_attn_layernorm.weight", {_HF_LAYER + "post_attention_layernorm.weight": "h"}),
)
_DENSE = (
    Rule(_LAYER + "mlp.linear_fc1.weight",
         {_HF_LAYER + "mlp.gate_proj.weight": "fh", _HF_LAYER + "mlp.up_proj.weight": "fh"}),
    Rule(_LAYER + "mlp.linear_fc2.weight", {_HF_LAYER + "mlp.down_proj.weight": "hf"}),
)
_MOE = (
    Rule(_LAYER + "mlp.router.weight", {_HF_LAYER + "mlp.gate.weight": "Eh"}),
    Rule(_LAYER + "mlp.router.bias", {_HF_LAYER + "mlp.gate.bias": "E"}, only_with_bias=True),
    Rule(_LAYER + "mlp.experts.experts.linear_fc1.weight", {
        _HF_LAYER + "mlp.experts.{e}.gate_proj.weight": "fh",
        _HF_LAYER + "mlp.experts.{e}.up_proj.weight": "fh",
    }),
    Rule(_LAYER + "mlp.experts.experts.linear_fc2.weight", {_HF_LAYER + "mlp.experts.{e}.down_proj.weight": "hf"}),
)
_PAIR = (
    Rule(_LAYER + "mlp.router.row", {_HF_LAYER + "mlp.gate.weight": "1h"}),
    Rule(_LAYER + "mlp.router.bias", {_HF_LAYER + "mlp.gate.bias": "1"}, only_with_bias=True),
    Rule(_LAYER + "mlp.expert.linear_fc1.weight", {
        _HF_LAYER + "mlp.experts.1.gate_proj.weight": "fh",
        _HF_LAYER + "mlp.experts.1.up_proj.weight": "fh",
    }),
    Rule(_LAYER + "mlp.expert.linear_fc2.weight", {_HF_LAYER + "mlp.experts.1.down_proj.weight": "hf"}),
)
_ROUTER = tuple(rule for rule in _MOE if ".router." in rule.key)
_END = (
    Rule(_LAYER + "post_mlp_layernorm.weight", {_HF_LAYER + "post_feedforward_layernorm.weight": "h"}),
    Rule("decoder.final_layernorm.weight", {"model.norm.weight": "h"}),
    Rule("output_layer.weight", {"lm_head.weight": "Vh"}),
)

TABLE: dict[Kind, tuple[Rule, ...]] = {
    "dense": _BACKBONE + _DENSE + _END,
    "moe": _BACKBONE + _MOE + _END,
    "pair": _PAIR,
    "router": _ROUTER,
}


@dataclass(frozen=True)
class Piece:
    """A run of rows of one canonical tensor and its place in a Megatron tensor."""

    name: str
    """Canonical name."""
    first_row: int
    """First row within the canonical tensor."""
    box: Box
    """Its place in the Megatron tensor; spans all columns."""

    def within(self, region: Box) -> tuple[Box, Box] | None:
        """Intersect with a region of the Megatron tensor.

        Returns:
            (part of the canonical tensor, the same part in the Megatron tensor), or None if they do not meet.
            The canonical part has one dimension less where the Megatron tensor has an expert axis.
        """
        part = intersect(self.box, region)
        if part is None:
            return None
        shift = self.first_row - self.box[-2][0] if len(self.box) > 1 else self.first_row - self.box[0][0]
        canonical = list(part[1:] if len(part) == 3 else part)
        canonical[0] = (canonical[0][0] + shift, canonical[0][1] + shift)
        return tuple(canonical), part


@dataclass(frozen=True)
class MegatronTensor:
    """One tensor of a Megatron checkpoint: its global shape and what it is made of."""

    key: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Disjoint, covering the tensor, in the order of its rows."""

    @property
    def chunks(self) -> tuple[Box, ...]:
        """The parts that Megatron on one rank stores apart: one for each canonical tensor, q/k/v together."""
        interleaved = len({piece.name for piece in self.pieces}) < len(self.pieces)
        return (whole(self.shape),) if interleaved else tuple(piece.box for piece in self.pieces)


class _Shaped(Protocol):
    shape: tuple[int, ...]


def intersect(a: Box, b: Box) -> Box | None:
    """Return the common part of two boxes of the same rank, or None if it is empty."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return common if all(first < last for first, last in common) else None


def slices(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """Return the index expression of ``box``, relative to the corner of ``origin`` if given."""
    corner = [first for first, _ in origin] if origin else [0] * len(box)
    return tuple(slice(first - start, last - start) for (first, last), start in zip(box, corner, strict=True))


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box that covers a tensor of ``shape``."""
    return tuple((0, size) for size in shape)


def _sizes(config: ModelConfig) -> dict[str, int]:
    heads = config.head_dim
    return {"V": config.vocab_size, "h": config.hidden_size, "f": config.ffn_hidden_size, "E": config.num_experts,
            "q": config.num_attention_heads * heads, "k": config.num_query_groups * heads, "1": 1}


def _check_kind(config: ModelConfig, kind: Kind) -> None:
    if kind not in TABLE:
        raise FlexOlmoError(f"checkpoint kind {kind!r}: expected one of {', '.join(TABLE)}")
    if kind in ("moe", "router") and not config.num_experts:
        raise FlexOlmoError(f"a {kind} checkpoint with model.num_experts = 0: expected 1 or more")


def _expand(rule: Rule, config: ModelConfig) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """Return (key, canonical name -> shape) for every layer of a rule; shapes of one expert where there is an {e}."""
    sizes = _sizes(config)
    layers = range(config.num_layers) if "{l}" in rule.key else [0]
    return [(rule.key.replace("{l}", str(layer)),
             {name.replace("{l}", str(layer)): tuple(sizes[letter] for letter in letters)
              for name, letters in rule.parts.items()})
            for layer in layers]


def _interleaved_runs(parts: dict[str, tuple[int, ...]], config: ModelConfig) -> list[tuple[str, int, int]]:
    groups = config.num_query_groups
    return [(name, group * (shape[0] // groups), shape[0] // groups)
            for group in range(groups) for name, shape in parts.items()]


def _tensor(key: str, parts: dict[str, tuple[int, ...]], interleaved: bool, config: ModelConfig) -> MegatronTensor:
    per_expert = any("{e}" in name for name in parts)
    rows = sum(shape[0] for shape in parts.values())
    columns = next(iter(parts.values()))[1:]
    runs = (_interleaved_runs(parts, config) if interleaved
            else [(name, 0, shape[0]) for name, shape in parts.items()])
    pieces = []
    for expert in range(config.num_experts if per_expert else 1):
        row = 0
        for name, first, count in runs:
            box: Box = ((row, row + count), *whole(columns))
            pieces.append(Piece(name.replace("{e}", str(expert)), first,
                                ((expert, expert + 1), *box) if per_expert else box))
            row += count
    shape = (rows, *columns)
    return MegatronTensor(key, (config.num_experts, *shape) if per_expert else shape, tuple(pieces))


def _rules(config: ModelConfig, kind: Kind) -> list[Rule]:
    _check_kind(config, kind)
    return [rule for rule in TABLE[kind] if config.router_bias or not rule.only_with_bias]


def megatron_tensors(config: ModelConfig, kind: Kind) -> dict[str, MegatronTensor]:
    """Return every tensor of a Megatron checkpoint of this architecture, by key, in the order of the model's layers."""
    tensors = [_tensor(key, parts, rule.interleaved, config)
               for rule in _rules(config, kind) for key, parts in _expand(rule, config)]
    return {tensor.key: tensor for tensor in sorted(tensors, key=lambda tensor: _depth(tensor.key, config))}


def _depth(name: str, config: ModelConfig) -> int:
    """Position of a tensor in the model: embedding, layers, the rest. Keeps files in the order of the computation."""
    fields = name.split(".")
    if "layers" in fields:
        return int(fields[fields.index("layers") + 1])
    return -1 if "embed" in name else config.num_layers


def expected_tensors(config: ModelConfig, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Return canonical name -> shape of every tensor of a model, in the order of its layers.

    Raises:
        FlexOlmoError: the kind is unknown or does not fit the architecture.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in megatron_tensors(config, kind).values():
        for piece in tensor.pieces:
            size = tuple(last - first for first, last in piece.box)[-2:]
            before = shapes.get(piece.name, (0,))
            shapes[piece.name] = (before[0] + size[0], *size[1:])
    return shapes


def check_tensors(tensors: Mapping[str, _Shaped], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check names and shapes against ``expected_tensors`` (or the shapes of ``megatron_tensors``).

    Raises:
        FlexOlmoError: a tensor is missing, unexpected or of the wrong shape; names it and ``where`` it was looked for.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise FlexOlmoError(f"{where}: tensor {name} is missing: expected shape {list(shape)}")
        if tuple(tensors[name].shape) != tuple(shape):
            raise FlexOlmoError(
                f"{where}: tensor {name} has shape {list(tensors[name].shape)}: expected {list(shape)}")
    for name in tensors:
        if name not in expected:
            raise FlexOlmoError(f"{where}: unexpected tensor {name} of shape {list(tensors[name].shape)}: "
                                "expected no tensor of that name in this architecture")


def pieces_in(tensor: MegatronTensor, region: Box) -> list[tuple[str, Box, Box]]:
    """Return (canonical name, its part, the same part's place in the Megatron tensor) for all of ``region``."""
    met = [(piece.name, piece.within(region)) for piece in tensor.pieces]
    return [(name, *parts) for name, parts in met if parts is not None]


def fill_region(tensor: MegatronTensor, offsets: tuple[int, ...], sizes: tuple[int, ...],
                tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Build one region of a Megatron tensor from canonical tensors.

    Args:
        tensor: from ``megatron_tensors``.
        offsets, sizes: the region in global coordinates, as a ShardedTensor's global_offset and local_shape have them
            (with the expert axis, where the tensor has one).
        tensors: the canonical tensors; each one needed is read once, one at a time.
        dtype: of the result; that of the first canonical tensor by default.

    Returns:
        A new tensor of shape ``sizes``.

    Raises:
        FlexOlmoError: the region does not lie in the tensor, a canonical tensor is missing, or their dtypes differ and
            none is given.
    """
    region = tuple((first, first + size) for first, size in zip(offsets, sizes, strict=True))
    parts = pieces_in(tensor, region)
    if sum(math.prod(last - first for first, last in box) for _, _, box in parts) != math.prod(sizes):
        raise FlexOlmoError(f"{tensor.key}: region at {list(offsets)} of shape {list(sizes)} does not lie in the "
                            f"tensor's shape {list(tensor.shape)}")
    by_name: dict[str, list[tuple[Box, Box]]] = {}
    for name, canonical, box in parts:
        by_name.setdefault(name, []).append((canonical, box))
    for name in by_name:
        if name not in tensors:
            raise FlexOlmoError(f"tensor {name} is missing: expected it for {tensor.key}")
    found = {name: tensors[name].dtype for name in by_name}
    if dtype is None and len(set(found.values())) > 1:
        raise FlexOlmoError(f"{', '.join(f'{name} is {found[name]}' for name in found)}: expected one dtype, because "
                            f"they form one Megatron tensor, {tensor.key}")
    if len(parts) == 1 and parts[0][1] == whole(tensors[parts[0][0]].shape):
        read = tensors[parts[0][0]].read()
        return read.reshape(sizes).to(dtype or read.dtype)
    result = torch.empty(sizes, dtype=dtype or tensors[parts[0][0]].dtype)
    for name, places in by_name.items():
        source = tensors[name].read()
        for canonical, box in places:
            target = result[slices(box, region)]
            target.copy_(source[slices(canonical)].reshape(target.shape))
        del source
    return result
