"""Whether an expert package from a stranger may be merged into a given anchor.

``exchange/package.py`` checks that a package is sound in itself; here it is compared with the anchor and its contents
are read. Nothing is written. A package's bias above 0 is accepted and reported: it is used as min(bias, 0).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexolmo_megatron.config.card import PUBLIC
from flexolmo_megatron.config.model import UNHASHED, ModelConfig
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import select_experts
from flexolmo_megatron.convert.rows import without_bias
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import DTYPE_NAMES, model_digest
from flexolmo_megatron.exchange.package import Package, open_package


@dataclass(frozen=True)
class AnchorReference:
    """What a package is compared with."""

    digest: str
    config: ModelConfig
    """Of the published anchor, or of any model merged from it."""
    dtype: torch.dtype
    """Of the anchor's FFN and router."""

    @classmethod
    def of(cls, model: LazyModel, digest: str | None = None,
           progress: Callable[[int], object] | None = None) -> "AnchorReference":
        """Describe a published anchor, or the anchor within a merged model.

        Args:
            digest: its digest where it is known; otherwise it is computed, which reads the anchor once.
            progress: called with the number of bytes after each tensor of that.

        Raises:
            FlexOlmoError: ``model`` is neither.
        """
        anchor = anchor_of(model)
        weights = [anchor.tensors[name] for name in ("model.layers.0.mlp.experts.0.gate_proj.weight",
                                                     "model.layers.0.mlp.gate.weight")]
        if weights[0].dtype != weights[1].dtype:
            raise FlexOlmoError(f"the anchor's FFN is {DTYPE_NAMES[weights[0].dtype]} and its router "
                                f"{DTYPE_NAMES[weights[1].dtype]}: expected one dtype")
        return cls(digest or model_digest(anchor, progress), anchor.card.model, weights[0].dtype)


class VerifiedPackage(Package):
    """A package that ``verify`` accepted. Its tensors raise FlexOlmoError if the file changes afterwards."""


def verify(path: str | os.PathLike, anchor: LazyModel | AnchorReference,
           progress: Callable[[int], object] | None = None) -> VerifiedPackage:
    """Check a package completely, reading all of it once.

    Args:
        path: the package directory.
        anchor: the published anchor or a model merged from it; an ``AnchorReference`` saves computing its digest again.
        progress: called with the number of bytes after each tensor of the package.

    Raises:
        FlexOlmoError: the package is refused; the sentence says why.
    """
    package = open_package(path)
    reference = anchor if isinstance(anchor, AnchorReference) else AnchorReference.of(anchor)
    check_fits(package, reference)
    package.check_contents(progress)
    return VerifiedPackage(**vars(package))


def check_fits(package: Package, anchor: AnchorReference) -> None:
    """Compare a package's manifest with the anchor.

    Raises:
        FlexOlmoError: another anchor, or sizes or dtype that do not fit it.
    """
    manifest, where = package.manifest, f"package {package.path}"
    if manifest.anchor_digest != anchor.digest:
        raise FlexOlmoError(f"{where} was trained against anchor {manifest.anchor_digest}, but this anchor is "
                            f"{anchor.digest}")
    ours = {field: getattr(anchor.config, field) for field in ("num_layers", "hidden_size", *UNHASHED)}
    for field, expected in {**ours, "dtype": DTYPE_NAMES[anchor.dtype]}.items():
        found = getattr(manifest.architecture, field)
        if found != expected and not (found is None and field in UNHASHED):
            raise FlexOlmoError(f"{where}: architecture.{field} = {found}: the anchor has {expected}")
    if manifest.architecture.ffn_hidden_size > anchor.config.ffn_hidden_size:
        raise FlexOlmoError(f"{where}: architecture.ffn_hidden_size = {manifest.architecture.ffn_hidden_size}: "
                            f"expected at most the anchor's {anchor.config.ffn_hidden_size}")


def anchor_of(model: LazyModel) -> LazyModel:
    """Return the published anchor within a merged model: expert 0 and its router row; of an anchor, the anchor itself.

    Raises:
        FlexOlmoError: ``model`` has no experts, or its first one is not the public anchor's.
    """
    card = model.card
    if card.kind != "moe" or card.expert_names[0] != PUBLIC:
        what = f"experts {', '.join(card.expert_names)}" if card.kind == "moe" else f"kind {card.kind!r}"
        raise FlexOlmoError(f"a model of {what} is no anchor: expected a published one (kind 'moe' with the expert "
                            f"{PUBLIC!r}) or a model merged from one")
    return without_bias(select_experts(model, [PUBLIC]))
