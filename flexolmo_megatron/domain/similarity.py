"""Domain vectors side by side: which domains a router can tell apart before any training.

Legend: n vectors, L layers, h hidden size.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flexolmo_megatron.domain.vector import ARRAYS, DomainVector, load_vector, same_reading
from flexolmo_megatron.errors import FlexOlmoError


def comparable(one: DomainVector, other: DomainVector) -> bool:
    """Whether the angle between two vectors means anything: same embedder that reads in the same way, same anchor,
    same shape, both centred or discriminants or neither."""
    return _kind(one) == _kind(other) and same_reading(one.reading, other.reading)


def _kind(vector: DomainVector) -> tuple[Any, ...]:
    return (vector.embedder_digest, vector.dense_digest, vector.vectors.shape, vector.centred, vector.biases is None)


def _unit_rows(vector: DomainVector) -> np.ndarray:
    lengths = vector.norm if vector.biases is None else np.linalg.norm(vector.vectors, axis=1, keepdims=True)
    return vector.vectors / lengths


def cosines(one: DomainVector, other: DomainVector) -> list[float]:
    """Cosine similarity of the rows of two comparable vectors, by layer `[L]`."""
    return np.einsum("lh,lh->l", _unit_rows(one), _unit_rows(other), dtype=np.float64).tolist()


def project(vectors: Sequence[DomainVector]) -> tuple[np.ndarray, tuple[float, float]]:
    """Principal components of comparable vectors, all layers together.

    Returns:
        Coordinates float64 `[n, 2]`, and the share of the variance along each of the two axes. Distances are those of
        rows of norm 1 as far as two dimensions can show them.

    Raises:
        FlexOlmoError: there are fewer than two vectors.
    """
    if len(vectors) < 2:
        raise FlexOlmoError(f"--plot shows domains relative to each other: expected at least 2 vectors, not "
                            f"{len(vectors)}")
    rows = np.stack([_unit_rows(vector).ravel() for vector in vectors]).astype(np.float64)
    rows /= np.sqrt(len(vectors[0].vectors))
    left, lengths, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    coordinates = left[:, :2] * lengths[:2]
    # Signs are arbitrary: the first vector that is off an axis is on its positive side.
    for axis in coordinates.T:
        axis *= np.sign(axis[np.argmax(np.abs(axis) > 1e-9)]) or 1
    total = float((lengths**2).sum()) or 1.0
    first, second = (lengths[:2] ** 2 / total).tolist()
    return coordinates, (first, second)


def describe_vectors(paths: Sequence[str]) -> dict[str, Any]:
    """Describe domain vectors and how similar each two are, as values that JSON can hold.

    Raises:
        FlexOlmoError: a file is missing or no domain vector.
    """
    vectors = [load_vector(path) for path in paths]
    similarities = [
        {"a": paths[a], "b": paths[b], "cosine": float(np.mean(by_layer)), "by_layer": by_layer}
        for b in range(len(paths)) for a in range(b) if comparable(vectors[a], vectors[b])
        for by_layer in [cosines(vectors[a], vectors[b])]]
    files = []
    for path, vector in zip(paths, vectors, strict=True):
        values = {key: value for key, value in asdict(vector).items() if key not in ARRAYS}
        if vector.privacy is not None:
            values["privacy"]["sigma"] = vector.privacy.sigma(vector.documents, len(vector.vectors))
        files.append({"path": path, "rows": vector.vectors.shape[0], "width": vector.vectors.shape[1],
                      "discriminant": vector.biases is not None, **values})
    pairs = len(paths) * (len(paths) - 1) // 2
    return {"vectors": files, "similarities": similarities, "incomparable_pairs": pairs - len(similarities)}


def short_names(paths: Sequence[str]) -> list[str]:
    """Names of files without folder and suffix where they differ, otherwise the paths."""
    stems = [Path(path).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else list(paths)


def render_vectors(description: dict[str, Any]) -> Group:
    """Return a description as tables for a rich console."""
    files = description["vectors"]
    paths = [one["path"] for one in files]
    names = short_names(paths)
    listing = Table(title="domain vectors", title_justify="left")
    for column in ("name", "rows", "embedder", "anchor", "documents", "dropped", "seed", "norm", "noise"):
        listing.add_column(column, overflow="fold")
    for name, one in zip(names, files, strict=True):
        noise = one["privacy"] and "epsilon {epsilon:g}, delta {delta:g}, clip {clip:g}, sigma {sigma:.3g}".format(
            **one["privacy"])
        kind = ", discriminants" if one["discriminant"] else ", centred" * one["centred"]
        rows = f"{one['rows']} x {one['width']}{kind}"
        reading = f", {one['reading']}" if one["reading"] else ""
        values = (name, rows, f"{one['embedder']}@{one['embedder_digest'][:12]}{reading}",
                  one["dense_digest"][:12], f"{one['documents']:,}", f"{one['dropped']:,}", one["seed"],
                  f"{one['norm']:g}", noise or "none")
        listing.add_row(*(Text(str(value)) for value in values))
    if len(files) < 2:
        return Group(listing)
    found = {(one["a"], one["b"]): one["cosine"] for one in description["similarities"]}
    table = Table(title="cosine similarity, mean over the rows", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right")
    for row, name in enumerate(names):
        cells = ["1" if column == row else
                 f"{found[key]:.4f}" if (key := (paths[min(row, column)], paths[max(row, column)])) in found else "-"
                 for column in range(len(names))]
        table.add_row(Text(name), *cells)
    note = ("- : vectors of different embedders, or of one that reads otherwise, of different anchors, sizes or kinds "
            "cannot be compared")
    return Group(listing, Text(""), table, *([Text(note)] if description["incomparable_pairs"] else []))


def plot_vectors(paths: Sequence[str], out: str) -> None:
    """Draw where the domains lie, as a PNG file.

    Raises:
        FlexOlmoError: fewer than two vectors, or some that cannot be compared.
    """
    from flexolmo_megatron.evaluation.plots import plot_domains

    vectors = [load_vector(path) for path in paths]
    for (a, one), (b, other) in combinations(zip(paths, vectors, strict=True), 2):
        if not comparable(one, other):
            raise FlexOlmoError(f"{b} and {a} cannot be in one picture: expected the same embedder that reads in the "
                                "same way, the same anchor and size")
    coordinates, shares = project(vectors)
    plot_domains(dict(zip(short_names(paths), coordinates.tolist(), strict=True)), shares, out)
