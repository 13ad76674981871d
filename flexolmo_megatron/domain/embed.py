"""From documents to a domain vector: the mean of their embeddings, one row for each layer or one for all.

Each row is scaled to the same norm, 1 by default. A mean hidden state grows with depth (every block of an OLMo-2 model
adds a normed output to the residual stream) and its length says little about the domain, while routing logits grow with
it: what a router should start from is the direction. Directions that are common to all text are removed on demand:
a centred row is the difference from the anchor's own. A discriminant (``discriminant.py``) keeps its length.

Legend: n documents, L layers, d dimension of the embedder, h hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.domain.privacy import GaussianMechanism, gaussian_noise
from flexolmo_megatron.domain.projection import orthogonal_projection
from flexolmo_megatron.domain.sample_pass import SamplePass
from flexolmo_megatron.domain.vector import DomainVector
from flexolmo_megatron.errors import FlexOlmoError

if TYPE_CHECKING:
    from flexolmo_megatron.domain.discriminant import PublicStates

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
    reading: str
    """What decides an embedding beside the weights: how many tokens of a document it reads, its pooling and prompt."""

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


def mean_embedding(embedder: Embedder, texts: Sequence[str], batch_size: int, *,
                   privacy: GaussianMechanism | None = None, resume: Path | None = None) -> tuple[np.ndarray, int]:
    """Average the embeddings of ``texts``, ``batch_size`` of them at a time, leaving out those that are not finite.

    Args:
        embedder: from ``open_embedder``.
        texts: documents.
        batch_size: embedded at once.
        privacy: clips the embeddings and adds noise to the mean; what is not finite then counts as zero.
        resume: file of ``SamplePass``, if a stopped run shall go on; the caller removes it when all is done.

    Returns:
        float64 `[L, d]` or `[1, d]`, and the number of documents left out.

    Raises:
        FlexOlmoError: there are no texts, or no embedding is finite.
    """
    sample = SamplePass(texts, batch_size, (embedder.digest, embedder.reading, privacy), resume)
    sums = sample.sums = {"embeddings": 0.0, "used": 0} | sample.sums
    for batch in sample:
        embeddings = embedder.embed(batch)
        finite = np.isfinite(embeddings).all(axis=(1, 2))
        counted = embeddings[finite] if privacy is None else privacy.clipped(embeddings)
        sums["embeddings"] = sums["embeddings"] + counted.sum(axis=0, dtype=np.float64)
        sums["used"] += int(finite.sum())
    used = int(sums["used"])
    if not used:
        raise FlexOlmoError(f"none of {len(texts)} documents has a finite embedding by {embedder.name}: "
                            "expected at least one")
    if privacy is None:
        return sums["embeddings"] / used, len(texts) - used
    rows = sums["embeddings"] / len(texts)
    return rows + gaussian_noise(rows.shape, privacy.sigma(len(texts), len(rows))), 0


def check_scale(norm: float) -> None:
    """Raise FlexOlmoError unless rows can be made as long as that."""
    if not 0 < norm < np.inf:
        raise FlexOlmoError(f"--scale {norm}: expected a number above 0")


def check_options(documents: int, seed: int, max_tokens: int, batch_size: int, scale: float) -> None:
    """Check the numbers that a sample and its embedding are made with, before there is either.

    Raises:
        FlexOlmoError: one is too small; named like the options of `flexolmo embed`.
    """
    for name, value, least in (("documents", documents, 1), ("seed", seed, 0), ("max-tokens", max_tokens, 1),
                               ("batch-size", batch_size, 1)):
        if value < least:
            raise FlexOlmoError(f"--{name} {value}: expected a number of at least {least}")
    check_scale(scale)


def domain_vector(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    hidden_size: int,
    dense_digest: str,
    seed: int,
    batch_size: int = DEFAULT_BATCH_SIZE,
    norm: float = 1.0,
    privacy: GaussianMechanism | None = None,
    centre: np.ndarray | None = None,
    public: "PublicStates | None" = None,
    resume: Path | None = None,
) -> DomainVector:
    """Make the domain vector of a sample of documents.

    Args:
        embedder: from ``open_embedder``.
        texts: the sample.
        hidden_size: of the anchor; a vector of another dimension is projected, the same way for every owner.
        dense_digest: of the anchor, from ``dense_digest``.
        seed: of the sample, for the record.
        batch_size: documents that are embedded at once; affects speed and memory alone.
        norm: Euclidean norm of each row; of discriminants a factor.
        privacy: noise for the mean, see privacy.py.
        centre: rows `[L or 1, h]` of the anchor whose directions are subtracted from those of the mean.
        public: makes the rows linear discriminants against these documents; from the same ``embedder``, the anchor.
        resume: see ``mean_embedding``.

    Raises:
        FlexOlmoError: there are no texts, no embedding is finite, or they average to nothing; or both privacy and
            public are given.
    """
    check_scale(norm)
    if privacy is not None and public is not None:
        raise FlexOlmoError("a private mean is no mean of hidden states: expected no noise with public documents")
    rows, dropped = mean_embedding(embedder, texts, batch_size, privacy=privacy, resume=resume)
    if rows.shape[1] != hidden_size:
        rows = rows @ orthogonal_projection(rows.shape[1], hidden_size, dense_digest)
    biases = moments = None
    if public is not None:
        moments = np.stack([rows, public.deviations()]).astype(np.float32)
        rows, biases = public.discriminants(rows)
        biases = (biases * norm).astype(np.float32)
    else:
        rows = _directions(rows, f"the embeddings of {len(texts)} documents by {embedder.name} average to")
    if centre is not None:
        rows = _directions(rows - _directions(centre, "rows of the anchor are"),
                           f"the direction of {len(texts)} documents differs from the anchor's by")
    return DomainVector(
        vectors=(rows * norm).astype(np.float32),
        biases=biases,
        moments=moments,
        embedder=embedder.name,
        embedder_digest=embedder.digest,
        reading=embedder.reading,
        dense_digest=dense_digest,
        documents=len(texts) - dropped,
        dropped=dropped,
        seed=seed,
        norm=float(norm),
        privacy=privacy,
        centred=centre is not None or public is not None,
    )


def _directions(rows: np.ndarray, what: str) -> np.ndarray:
    """Rows of norm 1; ``what`` begins the sentence on rows of zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise FlexOlmoError(f"{what} zero, which has no direction")
    return rows / lengths


def display_name(name: str) -> str:
    """A model's name as it is stored: of a folder only the last part, because the rest is the owner's own business."""
    return Path(name).resolve().name if Path(name).is_dir() else name
