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
from pathlib import Path

import numpy as np
import torch
from sklearn.covariance import shrunk_covariance

from flexolmo_megatron.domain.anchor import AnchorEmbedder
from flexolmo_megatron.domain.sample_pass import SamplePass
from flexolmo_megatron.errors import FlexOlmoError

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
        """Return the rows w `[L, h]` and biases b `[L]`, float64, for the mean states of an owner's documents.

        A router uses min(b, 0). Where b is above 0 the row takes it over: it gets b * S^-1 c / (c . S^-1 c), with c the
        middle between the two means, where the logit stays 0. No other change that does so adds less variance.
        """
        middle_Lh = (mean_Lh + self.mean_Lh) / 2
        covariance_Lhh = shrunk_covariance(self.covariance_Lhh, shrinkage=SHRINKAGE)
        solved_Lh2 = np.linalg.solve(covariance_Lhh, np.stack([mean_Lh - self.mean_Lh, middle_Lh], axis=-1))
        rows_Lh, towards_Lh = solved_Lh2[..., 0], solved_Lh2[..., 1]
        biases_L = -np.einsum("lh,lh->l", rows_Lh, middle_Lh)
        lengths_L = np.einsum("lh,lh->l", towards_Lh, middle_Lh)
        for layer in np.flatnonzero(biases_L > 0):
            rows_Lh[layer] += biases_L[layer] / lengths_L[layer] * towards_Lh[layer]
        return rows_Lh, biases_L.clip(max=0)

    def deviations(self) -> np.ndarray:
        """Return the standard deviation of each coordinate `[L, h]`, float64, after the same shrinkage."""
        variance_Lh = np.diagonal(self.covariance_Lhh, axis1=1, axis2=2)
        return np.sqrt((1 - SHRINKAGE) * variance_Lh + SHRINKAGE * variance_Lh.mean(axis=1, keepdims=True))


def public_states(embedder: AnchorEmbedder, texts: Sequence[str], batch_size: int,
                  resume: Path | None = None) -> PublicStates:
    """Read public documents with the anchor.

    Args:
        embedder: the anchor.
        texts: public documents.
        batch_size: read at once.
        resume: file of ``SamplePass``, if a stopped run shall go on; the caller removes it when all is done.

    Raises:
        FlexOlmoError: no document has a token, or a hidden state is not finite.
    """
    used = [text for text in texts if embedder.tokenizer.encode(text)]
    if not used:
        raise FlexOlmoError(f"none of {len(texts)} public documents has a token: expected at least one")
    sample = SamplePass(used, batch_size, ("states", embedder.digest, embedder.reading), resume)
    layers, hidden = embedder.gpt.config.num_layers, embedder.gpt.config.hidden_size
    sums = sample.sums or {"states": np.zeros((layers, hidden)), "products": np.zeros((layers, hidden, hidden))}
    mean_Lh, covariance_Lhh = (torch.from_numpy(sums[name]).to(embedder.device) for name in ("states", "products"))
    sample.sums = {"states": mean_Lh, "products": covariance_Lhh}
    for batch in sample:
        embedder.add_moments(batch, mean_Lh, covariance_Lhh)
    mean_Lh /= len(used)
    covariance_Lhh /= len(used)
    for layer, mean_h in enumerate(mean_Lh):
        covariance_Lhh[layer].addr_(mean_h, mean_h, alpha=-1)
        variance = covariance_Lhh[layer].trace().item()
        if not 0 < variance < float("inf"):
            raise FlexOlmoError(f"the public documents' hidden states in layer {layer} have the variance {variance:g}: "
                                "expected a number above 0; are there documents enough?")
    return PublicStates(mean_Lh.cpu().numpy(), covariance_Lhh.cpu().numpy())
