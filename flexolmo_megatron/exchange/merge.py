"""Merging: experts [public, 1 ... n] and router rows [r_public; r_1; ...; r_n], side by side, without joint training.

``merge`` and ``remove`` are compositions of tensors that are read later; ``write_merged`` writes a model and verifies
the packages in the same pass over their bytes. Other experts' tensors stay bitwise what they were.

A package with a smaller FFN than the anchor's is padded with zeros: an added inner unit computes silu(0) * 0 = 0 and
its column of down_proj is 0, so it adds exactly 0 to every output.

The router's bias is [0, b_1, ..., b_n] in fp32, and exists only if some package has one.

A row that joins tuned ones was not tuned with them: adding experts to a model whose router was tuned begins with its
untuned rows. Leaving some out keeps the tuned sets that they have not shaped (``convert/rows.py``).
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from flexolmo_megatron.config.card import ExpertRecord, ModelCard
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor, padded
from flexolmo_megatron.convert.model import exclude_experts, save_model, total_bytes, watch
from flexolmo_megatron.convert.names import expected_tensors
from flexolmo_megatron.convert.rows import Choice, untuned, without_bias
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import BackgroundDigest
from flexolmo_megatron.exchange.hash_pool import HashPool
from flexolmo_megatron.exchange.package import PROJECTIONS, Package, open_package
from flexolmo_megatron.exchange.progress import Progress, no_progress
from flexolmo_megatron.exchange.read_ahead import ReadAhead
from flexolmo_megatron.exchange.verify import AnchorReference, VerifiedPackage, anchor_of, check_fits
from flexolmo_megatron.files import atomic_directory
from flexolmo_megatron.streaming import recycling

DEFAULT_TOP_K = 4
"""Quality plateaus at 4 active experts (arXiv 2507.07024, section 5)."""


def merge(base: LazyModel, packages: Sequence[VerifiedPackage], *, top_k: int | None = None) -> LazyModel:
    """Add experts to a published anchor, or to a model merged from it; reads the anchor within ``base`` once.

    What a package was verified against, and what a card says, is not relied on: the digest that every package names is
    compared with the one of the anchor's own tensors. ``write_merged`` does the same while it writes.

    Args:
        base: kind "moe", first expert "public".
        packages: in the order of their new experts, from ``verify``.
        top_k: active experts; by default the number that was once chosen for a merged ``base``, otherwise 4, or all if
            there are fewer.

    Raises:
        FlexOlmoError: an expert name is taken, a package does not fit ``base`` or the others, or top_k is impossible.
    """
    if not all(isinstance(package, VerifiedPackage) for package in packages):
        raise TypeError("merge takes packages from verify()")
    merged = compose(base, packages, top_k=top_k)
    if packages:  # all of them name the same anchor
        check_fits(packages[0], AnchorReference.of(base))
    return merged


def compose(base: LazyModel, packages: Sequence[Package], *, top_k: int | None = None) -> LazyModel:
    """``merge`` of packages that are yet to be checked: their contents, and their anchor's digest against ``base``."""
    base = untuned(base) if packages else base
    card = base.card
    digest = claimed_anchor(base, packages)
    if packages:
        reference = AnchorReference.of(base, digest=digest)
        for package in packages:
            check_fits(package, reference)
    window = _router_window(base, packages)
    first = card.model.num_experts
    count = first + len(packages)
    has_bias = card.model.router_bias or any(package.has_bias for package in packages)
    chosen = _chosen_top_k(card) if top_k is None else top_k
    config = replace(card.model, num_experts=count, router_bias=has_bias, router_window=window,
                     top_k=min(count, chosen or DEFAULT_TOP_K) if top_k is None else top_k)
    tensors = dict(base.tensors)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.mlp."
        for number, package in enumerate(packages, first):
            for projection in PROJECTIONS:
                shape = base.tensors[f"{prefix}experts.0.{projection}.weight"].shape
                part = package.tensors[f"layers.{layer}.{projection}"]
                tensors[f"{prefix}experts.{number}.{projection}.weight"] = padded(part, shape)
        rows = [package.tensors[f"layers.{layer}.router"] for package in packages]
        tensors[prefix + "gate.weight"] = _appended(base.tensors[prefix + "gate.weight"], rows)
        if has_bias:
            known = base.tensors.get(prefix + "gate.bias", _zeros(first))
            added = [package.tensors[f"layers.{layer}.bias"] if package.has_bias else _zeros() for package in packages]
            tensors[prefix + "gate.bias"] = _appended(known, added)
    experts = [*card.experts, *(_record(package) for package in packages)]
    training = card.training if first > 1 else {}  # of the anchor alone it says nothing about the merged model
    merged = replace(card, model=config, experts=experts, anchor_digest=digest, training=training, chosen_top_k=chosen)
    # In the order of the model, which is also the order of each package's file: then it is hashed in one pass.
    return LazyModel(merged, {name: tensors[name] for name in expected_tensors(config, "moe")}, base.other_rows)


def claimed_anchor(base: LazyModel, packages: Sequence[Package]) -> str | None:
    """Return the anchor digest that ``base``'s card and all packages agree on; None if none of them gives one.

    Raises:
        FlexOlmoError: two of them differ.
    """
    claims = [(base.card.anchor_digest, "the given model")] if base.card.anchor_digest else []
    claims += [(package.manifest.anchor_digest, f"package {package.path}") for package in packages]
    for digest, who in claims:
        if digest != claims[0][0]:
            raise FlexOlmoError(f"{who} was trained against anchor {digest}, but {claims[0][1]} belongs to "
                                f"{claims[0][0]}")
    return claims[0][0] if claims else None


def _router_window(base: LazyModel, packages: Sequence[Package]) -> int:
    """Return the router_window of the experts of a merged ``base`` and of all packages; an anchor alone has none.

    Raises:
        FlexOlmoError: two of them differ.
    """
    windows = [(base.card.model.router_window, "the given model")] if base.card.model.num_experts > 1 else []
    windows += [(package.manifest.architecture.router_window, f"package {package.path}") for package in packages]
    for window, who in windows:
        if window != windows[0][0]:
            raise FlexOlmoError(f"{who} was trained with expert.router_window = {window}, but {windows[0][1]} with "
                                f"{windows[0][0]}: expected the same for all experts of a model")
    return windows[0][0] if windows else 1


def remove(merged: LazyModel, names: Sequence[str], rows: Choice = "strict") -> LazyModel:
    """Take experts out of a merged model. A router bias that is left with zeros only goes, too.

    top_k becomes at most the number of experts that are left; one that was chosen is remembered, and comes back when
    experts are added again.

    Args:
        merged: kind "moe".
        names: of the experts that go.
        rows: of a model whose router was tuned, see ``rows.choose``.

    Raises:
        FlexOlmoError: an unknown name, or the anchor's own expert.
    """
    rest = exclude_experts(replace(merged, card=replace(merged.card, chosen_top_k=_chosen_top_k(merged.card))), names,
                           rows)
    biases = [tensor for tensors in (rest.tensors, *rest.other_rows.values()) for name, tensor in tensors.items()
              if name.endswith(".mlp.gate.bias")]
    return rest if any(bias.read().any() for bias in biases) else without_bias(rest)


@dataclass(frozen=True)
class MergeReport:
    """What ``write_merged`` wrote."""

    card: ModelCard
    num_bytes: int
    """Of the merged model's tensors."""
    positive_bias_layers: dict[str, list[int]]
    """Expert name -> layers where the package's bias is above 0 and so has no effect; only experts with such layers."""


def write_merged(base: LazyModel, packages: Sequence[str | os.PathLike], out: str | os.PathLike, *,
                 format: Literal["hf", "megatron"] = "megatron", top_k: int | None = None, drop_bias: bool = False,
                 progress: Progress = no_progress) -> MergeReport:
    """Merge package directories into ``base`` and write the model to ``out``, which appears complete or not at all.

    Each package is checked as ``verify`` does, and the anchor's digest is computed, while the model is being written
    under a temporary name; it gets its own name only after both. Every byte of a package is read once and hashed once.

    Args:
        base: published anchor or merged model, see ``merge``.
        packages: directories, in the order of their new experts; without any, ``base`` is written.
        format: "megatron" or "hf".
        drop_bias: write a Hugging Face directory although the model has a bias, without it.
        progress: shows how far reading the merged model's tensors has got, see ``Progress``.

    Raises:
        FlexOlmoError: a package is refused, or ``out`` exists or cannot be written.
    """
    out = Path(out)
    with _one_torch_thread(), recycling(), HashPool() as pool:
        opened = [open_package(path, pool) for path in packages]
        merged = compose(base, opened, top_k=top_k)
        with (atomic_directory(out) as staging, _anchor_check(base, opened) as check_anchor,
              progress(total_bytes(merged)) as add, ReadAhead(merged) as read_ahead):

            def after_read(count: int) -> None:
                check_anchor(False)  # rather now than after the rest has been written
                add(count)

            _save(watch(read_ahead, after_read), staging, out, format, drop_bias)
            for package in opened:
                package.check_contents()
            check_anchor(True)
        positive = {package.manifest.name: package.positive_bias_layers() for package in opened}
    return MergeReport(merged.card, total_bytes(merged), {name: layers for name, layers in positive.items() if layers})


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch's own threads from competing, waiting busily, with those that hash."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _anchor_check(base: LazyModel, packages: Sequence[Package]) -> Iterator[Callable[[bool], None]]:
    """Compute the digest of the anchor within ``base`` in the background.

    Yields:
        A function that compares it with the packages' if it is known already, or, called with True, waits for it.
    """
    if not packages:
        yield lambda wait: None
        return
    digest = BackgroundDigest(anchor_of(base))

    def check(wait: bool) -> None:
        if wait or digest.ready():
            check_fits(packages[0], AnchorReference.of(base, digest.result()))

    try:
        yield check
    finally:
        digest.stop()


def _save(model: LazyModel, staging: Path, out: Path, format: str, drop_bias: bool) -> None:
    # Inside of the staging folder, so that the next merge sweeps what a killed one left of this, too.
    folder = staging / "model"
    try:
        save_model(model, folder, format=format, drop_bias=drop_bias)
    except FlexOlmoError as error:
        raise FlexOlmoError(str(error).replace(str(folder), str(out))) from error
    for path in folder.iterdir():
        path.rename(staging / path.name)
    folder.rmdir()


def _chosen_top_k(card: ModelCard) -> int | None:
    """The number of active experts that somebody chose; None if it follows from the number of experts."""
    if card.chosen_top_k is None and card.model.top_k != min(card.model.num_experts, DEFAULT_TOP_K):
        return card.model.top_k  # a model that was not merged by this package
    return card.chosen_top_k


def _record(package: Package) -> ExpertRecord:
    m = package.manifest
    return ExpertRecord(m.name, m.sha256, owner=m.owner, licence=m.licence, contact=m.contact, router=m.router)


def _appended(rows: LazyTensor, added: Sequence[LazyTensor]) -> LazyTensor:
    """Append tensors of one dimension less, each as one more row."""
    return LazyTensor(rows.dtype, (rows.shape[0] + len(added), *rows.shape[1:]),
                      lambda: torch.cat([rows.read(), *(row.read().unsqueeze(0) for row in added)]))


def _zeros(*shape: int) -> LazyTensor:
    return LazyTensor(torch.float32, shape, lambda: torch.zeros(shape))
