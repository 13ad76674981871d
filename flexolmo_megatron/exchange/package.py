"""The expert package: a directory with ``manifest.json`` and ``expert.safetensors``, and nothing else.

``pack`` makes one from what an owner trained; ``open_package`` opens one that a stranger made and checks that it is
sound in itself. Whether it fits an anchor, and what its tensors hold, is for ``exchange/verify.py``.

Tensors (L layers, f FFN size, h hidden size), for each layer l:
``layers.{l}.gate_proj`` and ``up_proj`` [f, h], ``down_proj`` [h, f], ``router`` [h]; optional ``bias`` [] in F32.
Either every layer has a bias or none.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.model import watch
from flexolmo_megatron.convert.safetensors_io import write_tensors
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import DTYPE_NAMES
from flexolmo_megatron.exchange.hash_pool import HashPool
from flexolmo_megatron.exchange.manifest import (
    DP_FIELDS,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    ROUTER_FIELDS,
    TENSOR_FILE,
    TRAINING_FIELDS,
    Architecture,
    Manifest,
    parse_manifest,
)
from flexolmo_megatron.exchange.safe_open import open_directory, open_regular, read_start
from flexolmo_megatron.exchange.tensor_file import TensorFile
from flexolmo_megatron.files import atomic_directory, write_json
from flexolmo_megatron.streaming import streaming_file

WHAT = f"an expert package, which holds {MANIFEST_FILE} and {TENSOR_FILE} and nothing else"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Package:
    """An open package that is sound in itself. Its tensors are hashed as they are read, see ``TensorFile``."""

    path: Path
    manifest: Manifest
    file: TensorFile
    tensors: dict[str, LazyTensor]
    """By their names in the package, in the order of the file."""
    has_bias: bool

    @property
    def num_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(entry.nbytes for entry in self.file.entries.values())

    def check_contents(self, progress: Callable[[int], object] | None = None) -> None:
        """Read what was not read yet and check it; ``progress`` gets the number of bytes after each tensor read now.

        Raises:
            FlexOlmoError: the file's sha256 is not the manifest's, or a number is not finite.
        """
        self.file.finish(self.manifest.sha256, progress)

    def positive_bias_layers(self) -> list[int]:
        """Layers whose bias is above 0. It is used as min(bias, 0), so there it has no effect."""
        if not self.has_bias:
            return []
        layers = range(self.manifest.architecture.num_layers)
        return [layer for layer in layers if self.tensors[f"layers.{layer}.bias"].read().item() > 0]


def expected_package_tensors(architecture: Architecture, has_bias: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of every tensor, layer by layer. Lazy: the number of layers may be a stranger's."""
    h, f = architecture.hidden_size, architecture.ffn_hidden_size
    shapes = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f), "router": (h,)}
    for layer in range(architecture.num_layers):
        for kind, shape in shapes.items():
            yield f"layers.{layer}.{kind}", architecture.dtype, shape
        if has_bias:
            yield f"layers.{layer}.bias", "F32", ()


def open_package(path: str | os.PathLike, pool: HashPool | None = None) -> Package:
    """Open a package and check everything but the contents of its tensors.

    Args:
        path: the package directory.
        pool: hashes tensors beside their reader; without it, each read hashes before it returns.

    Raises:
        FlexOlmoError: anything else in the directory, a link or device, a bad manifest, a tensor file whose header is
            unsound or does not match the manifest.
    """
    path = Path(path)
    directory = open_directory(path, (MANIFEST_FILE, TENSOR_FILE), WHAT)
    try:
        manifest = _read_manifest(directory, path / MANIFEST_FILE)
        where = str(path / TENSOR_FILE)
        descriptor = open_regular(directory, TENSOR_FILE, where)
    finally:
        os.close(directory)
    file = TensorFile(descriptor, where, pool)
    has_bias = "layers.0.bias" in file.entries
    _check_entries(file, manifest.architecture, has_bias)
    return Package(path, manifest, file, file.tensors(), has_bias)


def _read_manifest(directory: int, path: Path) -> Manifest:
    descriptor = open_regular(directory, MANIFEST_FILE, str(path))
    try:
        data = read_start(descriptor, MAX_MANIFEST_BYTES + 1, str(path))
    finally:
        os.close(descriptor)
    return parse_manifest(data, str(path))


def _check_entries(file: TensorFile, architecture: Architecture, has_bias: bool) -> None:
    names = set()
    for name, dtype, shape in expected_package_tensors(architecture, has_bias):
        if name not in file.entries:
            raise FlexOlmoError(f"{file.where}: tensor {name} is missing: expected {dtype} {list(shape)}")
        entry = file.entries[name]
        if tuple(entry.shape) != shape:
            raise FlexOlmoError(f"{file.where}: tensor {name} has shape {list(entry.shape)}: expected {list(shape)}, "
                                "from the manifest's architecture")
        if DTYPE_NAMES[entry.dtype] != dtype:
            raise FlexOlmoError(f"{file.where}: tensor {name} is {DTYPE_NAMES[entry.dtype]}: expected {dtype}, "
                                "from the manifest's architecture")
        names.add(name)
    for name in file.entries:
        if name not in names:
            raise FlexOlmoError(f"{file.where}: unexpected tensor {ascii(name[:80])}: an expert has none of that name")


def pack(pair: LazyModel, anchor_digest: str | None, out: str | os.PathLike, *, name: str,
         owner: str = "", licence: str = "", contact: str = "",
         progress: Callable[[int], object] | None = None) -> Manifest:
    """Write the package of a trained pair to ``out``, a new directory.

    Args:
        pair: card.kind "pair"; its card gives the training summary and how the router row was made. Of those only
            the manifest's own fields are taken over, so that nothing else about the owner's data leaves with them.
        anchor_digest: of the anchor that the pair was trained against; None to take the card's.
        name: of the expert, unique in any model that it will be merged into.
        owner, licence, contact: free text.
        progress: called with the number of bytes after each tensor.

    Raises:
        FlexOlmoError: not a pair, a bad name or text, no or another anchor digest than the card's, numbers that are
            not finite, or ``out`` cannot be written.
    """
    card = pair.card
    if card.kind != "pair":
        raise FlexOlmoError(f"a checkpoint of kind {card.kind!r} cannot be packed: expected 'pair', which an owner's "
                            "run writes")
    if anchor_digest is None:
        anchor_digest = card.anchor_digest
    if anchor_digest is None:
        raise FlexOlmoError("the checkpoint does not record the anchor it was trained against; name the anchor")
    if card.anchor_digest not in (None, anchor_digest):
        raise FlexOlmoError(f"the checkpoint was trained against anchor {card.anchor_digest}, not against "
                            f"{anchor_digest}")
    tensors = _package_tensors(pair if progress is None else watch(pair, progress))
    training = _only(TRAINING_FIELDS, card.training)
    if isinstance(training.get("dp"), dict):
        training["dp"] = _only(DP_FIELDS, training["dp"])
    manifest = Manifest(
        name=name, anchor_digest=anchor_digest, sha256="0" * 64, owner=owner, licence=licence, contact=contact,
        architecture=Architecture(dtype=DTYPE_NAMES[tensors["layers.0.gate_proj"].dtype],
                                  **{field.name: getattr(card.model, field.name) for field in fields(Architecture)
                                     if field.name != "dtype"}),
        router=_only(ROUTER_FIELDS, card.experts[1].router), training=training,
    )
    with atomic_directory(out) as folder:
        with streaming_file(folder / TENSOR_FILE) as file:
            write_tensors(file, tensors)
        # Hash what is on disk, through the reader that every coordinator will use.
        directory = os.open(folder, os.O_RDONLY)
        try:
            written = TensorFile(open_regular(directory, TENSOR_FILE, f"{out}/{TENSOR_FILE}"), f"{out}/{TENSOR_FILE}")
        finally:
            os.close(directory)
        _check_entries(written, manifest.architecture, "layers.0.bias" in tensors)
        manifest = replace(manifest, sha256=written.sha256())
        written.finish(manifest.sha256)
        write_json(folder / MANIFEST_FILE, manifest.to_json())
    return manifest


def _package_tensors(pair: LazyModel) -> dict[str, LazyTensor]:
    """Return the pair's tensors under their names in a package, in the order in which a merge reads them.

    A run may have computed in another type than the anchor's; what it hands over has the anchor's, and biases are fp32.
    """
    routers, weights = {}, {}
    dtype = getattr(torch, pair.card.anchor_dtype) if pair.card.anchor_dtype else None
    for layer in range(pair.card.model.num_layers):
        prefix = f"model.layers.{layer}.mlp."
        row = pair.tensors[prefix + "gate.weight"]
        routers[f"layers.{layer}.router"] = _converted(row, dtype, row.shape[1:])
        if prefix + "gate.bias" in pair.tensors:
            routers[f"layers.{layer}.bias"] = _converted(pair.tensors[prefix + "gate.bias"], torch.float32, ())
        for projection in PROJECTIONS:
            weight = pair.tensors[f"{prefix}experts.1.{projection}.weight"]
            weights[f"layers.{layer}.{projection}"] = _converted(weight, dtype, weight.shape)
    return routers | weights


def _converted(tensor: LazyTensor, dtype: torch.dtype | None, shape: tuple[int, ...]) -> LazyTensor:
    dtype = dtype or tensor.dtype
    return LazyTensor(dtype, shape, lambda: tensor.read().to(dtype).reshape(shape))


def _only(known: dict[str, type], values: dict) -> dict:
    """Return the manifest's own fields of ``values``; one that is unknown (None) is left out."""
    return {key: values[key] for key in known if values.get(key) is not None}
