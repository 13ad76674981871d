"""From documents to a domain vector: the mean of their embeddings, one row for each layer or one for all.

Each row is scaled to the same norm, 1 by default. A mean hidden state grows with depth (every block of an OLMo-2 model
adds a normed output to the residual stream) and its length says little about the domain, while routing logits grow with
it: what a router should start from is the direction. Not done here: directions common to all text are not removed.

Legend: n documents, L layers, d dimension of the embedder, h hidden size.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.domain.projection import orthogonal_projection
from flexolmo_megatron.domain.vector import DomainVector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.progress import DocumentProgress

ANCHOR = "anchor"
"""Name of the embedder that is the anchor itself."""
DEFAULT_MAX_TOKENS = 512
DEFAULT_BATCH_SIZE = 8


class Embedder(Protocol):
    """Something that embeds documents: what one of them gets does not depend on the rest of its batch."""

    name: str
    """As in ``DomainVector.embedder``."""
    digest: str
    """As in ``DomainVector.embedder_digest``."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `[n, L, d]`, or `[n, 1, d]` where one embedding serves all layers."""
        ...


def open_embedder(name: str, anchor: LazyModel, dense_digest: str, max_tokens: int = DEFAULT_MAX_TOKENS) -> Embedder:
    """Load an embedder.

    Args:
        name: ``anchor``, or the name or folder of a sentence-transformers or GritLM model.
        anchor: dense or published.
        dense_digest: of the anchor, from ``dense_digest``.
        max_tokens: the rest of a longer document is ignored.

    Raises:
        FlexOlmoError: it cannot be loaded, or needs a package that is not installed.
    """
    if max_tokens < 1:
        raise FlexOlmoError(f"--max-tokens {max_tokens}: expected a number of at least 1")
    if name == ANCHOR:
        from flexolmo_megatron.domain.anchor import AnchorEmbedder

        return AnchorEmbedder(anchor, dense_digest, max_tokens)
    from flexolmo_megatron.domain.text_models import GritLMEmbedder, SentenceTransformerEmbedder, is_gritlm

    return (GritLMEmbedder if is_gritlm(name) else SentenceTransformerEmbedder)(name, max_tokens)


def _batches(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    # Sorted by length, so that little of a batch is padding; longest first, so that a lack of memory shows at once.
    ordered = sorted(texts, key=len, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def mean_embedding(embedder: Embedder, texts: Sequence[str], batch_size: int) -> tuple[np.ndarray, int]:
    """Average the embeddings of ``texts``, ``batch_size`` of them at a time, leaving out those that are not finite.

    Returns:
        float64 `[L, d]` or `[1, d]`, and the number of documents left out.

    Raises:
        FlexOlmoError: there are no texts, or no embedding is finite.
    """
    if batch_size < 1:
        raise FlexOlmoError(f"--batch-size {batch_size}: expected a number of at least 1")
    total: np.ndarray | float = 0.0
    used = 0
    with DocumentProgress() as progress:
        for batch in _batches(texts, batch_size):
            embeddings = embedder.embed(batch)
            finite = embeddings[np.isfinite(embeddings).all(axis=(1, 2))]
            total = total + finite.sum(axis=0, dtype=np.float64)
            used += len(finite)
            progress.add(len(batch), sum(len(text.encode()) for text in batch))
    if not used:
        raise FlexOlmoError(f"none of {len(texts)} documents has a finite embedding by {embedder.name}: "
                            "expected at least one")
    return total / used, len(texts) - used


def domain_vector(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    hidden_size: int,
    dense_digest: str,
    seed: int,
    batch_size: int = DEFAULT_BATCH_SIZE,
    norm: float = 1.0,
) -> DomainVector:
    """Make the domain vector of a sample of documents.

    Args:
        embedder: from ``open_embedder``.
        texts: the sample.
        hidden_size: of the anchor; a vector of another dimension is projected, the same way for every owner.
        dense_digest: of the anchor, from ``dense_digest``.
        seed: of the sample, for the record.
        batch_size: documents that are embedded at once; affects speed and memory alone.
        norm: Euclidean norm of each row.

    Raises:
        FlexOlmoError: there are no texts, no embedding is finite, or they average to nothing.
    """
    if not 0 < norm < np.inf:
        raise FlexOlmoError(f"--scale {norm}: expected a number above 0")
    rows, dropped = mean_embedding(embedder, texts, batch_size)
    if rows.shape[1] != hidden_size:
        rows = rows @ orthogonal_projection(rows.shape[1], hidden_size, dense_digest)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise FlexOlmoError(f"the embeddings of {len(texts)} documents by {embedder.name} average to zero, "
                            "which has no direction")
    return DomainVector(
        vectors=(rows * (norm / lengths)).astype(np.float32),
        embedder=embedder.name,
        embedder_digest=embedder.digest,
        dense_digest=dense_digest,
        documents=len(texts) - dropped,
        dropped=dropped,
        seed=seed,
        norm=float(norm),
    )


def display_name(name: str) -> str:
    """A model's name as it is stored: of a folder only the last part, because the rest is the owner's own business."""
    return Path(name).resolve().name if Path(name).is_dir() else name
