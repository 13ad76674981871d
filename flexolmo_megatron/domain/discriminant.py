"""Linear discriminants as router rows: how much likelier a hidden state is in an owner's than in public documents.

For Gaussian hidden states of one covariance S, here that of public documents, the log-likelihood ratio of a state x is
w . x + b with w = S^-1 (m - m_pub) and b = -w . (m + m_pub) / 2 (linear discriminant analysis; Bishop, Pattern
Recognition and Machine Learning, section 4.2.1). It is in nats for every owner, so rows that never met can be compared
after a merge, while a row that learns to tell its owner's documents from public ones says nothing reliable about a
third domain.

Legend: L layers, h hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.covariance import shrunk_covariance

from flexolmo_megatron.domain.anchor import AnchorEmbedder
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.progress import DocumentProgress

SHRINKAGE = 0.1
"""Share of the mean variance in the covariance: in directions where public text hardly varies, an owner's may."""


@dataclass(frozen=True)
class PublicStates:
    """Hidden states before each layer's router in public documents, each document counting the same."""

    mean_Lh: np.ndarray
    """float64."""
    covariance_Lhh: np.ndarray
    """float64, of single tokens' states."""

    def discriminants(self, mean_Lh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows w `[L, h]` and biases b `[L]`, float64, for the mean states of an owner's documents."""
        difference_Lh = mean_Lh - self.mean_Lh
        covariance_Lhh = shrunk_covariance(self.covariance_Lhh, shrinkage=SHRINKAGE)
        rows_Lh = np.linalg.solve(covariance_Lhh, difference_Lh[..., None])[..., 0]
        return rows_Lh, -np.einsum("lh,lh->l", rows_Lh, mean_Lh + self.mean_Lh) / 2


def public_states(embedder: AnchorEmbedder, texts: Sequence[str], batch_size: int) -> PublicStates:
    """Read public documents with the anchor.

    Args:
        embedder: the anchor.
        texts: public documents.
        batch_size: read at once.

    Raises:
        FlexOlmoError: no document has a token, or a hidden state is not finite.
    """
    sums: list[Any] = [0.0, 0.0]
    # As for a domain vector: little padding, and a lack of memory shows at once.
    ordered = sorted((text for text in texts if embedder.tokenizer.encode(text)), key=len, reverse=True)
    if not ordered:
        raise FlexOlmoError(f"none of {len(texts)} public documents has a token: expected at least one")
    with DocumentProgress() as progress:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            sums = [total + part for total, part in zip(sums, embedder.moments(batch), strict=True)]
            progress.add(len(batch), sum(len(text.encode()) for text in batch))
    mean_Lh, second_Lhh = (total / len(ordered) for total in sums)
    covariance_Lhh = second_Lhh - torch.einsum("lh,lk->lhk", mean_Lh, mean_Lh)
    if not covariance_Lhh.isfinite().all():
        raise FlexOlmoError("the anchor's hidden states of public documents are not finite numbers")
    return PublicStates(mean_Lh.cpu().numpy(), covariance_Lhh.cpu().numpy())
