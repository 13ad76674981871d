"""The Gaussian mechanism for domain vectors: differential privacy for the documents behind one.

What it protects: whoever sees the vector, and knows all documents of the sample but one, learns almost nothing about
that one: (epsilon, delta) bounds what replacing a document by any other one changes (Dwork et al. 2006). What it does
not: the domain as a whole, which is what the vector is for; an owner whose documents share a secret (a hundred
documents by one person are a hundred times easier to tell); the expert's weights, which are trained on the documents
without it; several vectors of the same documents, whose epsilons add up; and the lowest bits of floating-point numbers,
which can tell more than real-valued noise would (Mironov 2012). The number of documents is published.

Noise comes from the operating system's generator, never from a seed.

Legend: L rows (layers, or 1), d dimension of the embedder.
"""

import math
import os
from dataclasses import dataclass

import numpy as np

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.untrusted import shown

DEFAULT_DELTA, DEFAULT_CLIP = 1e-6, 1.0
"""Where an epsilon is given without them; the command's help says so, too."""


@dataclass(frozen=True)
class GaussianMechanism:
    """How much noise a domain vector gets. Building one validates it."""

    epsilon: float
    delta: float
    clip: float
    """Each row of a document's embedding is shortened to this Euclidean norm if it is longer."""

    def __post_init__(self) -> None:
        for key, largest in (("epsilon", math.inf), ("delta", 1.0), ("clip", math.inf)):
            value = getattr(self, key)
            if type(value) is not float or not 0 < value < largest:
                limit = " and below 1" if largest == 1 else ""
                raise FlexOlmoError(f"{key} = {shown(value)}: expected a number above 0{limit}")

    def sensitivity(self, documents: int, rows: int) -> float:
        """How far the mean embedding, as one vector of all rows, moves at most if one document is replaced."""
        return 2 * self.clip * math.sqrt(rows) / documents

    def sigma(self, documents: int, rows: int) -> float:
        """Standard deviation of the noise on each number of the mean."""
        return gaussian_sigma(self.epsilon, self.delta) * self.sensitivity(documents, rows)

    def clipped(self, embeddings: np.ndarray) -> np.ndarray:
        """Embeddings `[n, L, d]` with every row within the clip; a document's that is not finite becomes zero."""
        finite = np.isfinite(embeddings).all(axis=(1, 2))
        result = np.where(finite[:, None, None], embeddings, 0).astype(np.float64)
        norms = np.linalg.norm(result, axis=2, keepdims=True)
        return result * np.minimum(1, self.clip / np.maximum(norms, self.clip))


def chosen_mechanism(epsilon: float | None, delta: float | None, clip: float | None) -> GaussianMechanism | None:
    """Return what the options of `flexolmo embed` ask for; None for no noise.

    Raises:
        FlexOlmoError: an impossible value, or options that say nothing without an epsilon.
    """
    if epsilon is not None:
        return GaussianMechanism(epsilon, DEFAULT_DELTA if delta is None else delta,
                                 DEFAULT_CLIP if clip is None else clip)
    for name, value in (("delta", delta), ("clip", clip)):
        if value is not None:
            raise FlexOlmoError(f"--{name} {value:g} is about noise, which --epsilon asks for: expected that, too")
    return None


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """The smallest delta of noise ``sigma`` at sensitivity 1: Balle and Wang 2018 (arXiv 1805.06530), theorem 8."""
    from scipy.special import log_ndtr

    left = log_ndtr(0.5 / sigma - epsilon * sigma)
    right = epsilon + log_ndtr(-0.5 / sigma - epsilon * sigma)
    return float(math.exp(left) - math.exp(right))


def gaussian_sigma(epsilon: float, delta: float) -> float:
    """The least noise that is (epsilon, delta)-private at a sensitivity of 1, rounded up by up to a billionth.

    For any epsilon, unlike the classic sqrt(2 log(1.25 / delta)) / epsilon, which holds below 1 and is larger.
    """
    low = high = 1.0
    while gaussian_delta(high, epsilon) > delta:
        high *= 2
    while gaussian_delta(low, epsilon) <= delta:
        low /= 2
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if gaussian_delta(middle, epsilon) <= delta else (middle, high)
    return high


def gaussian_noise(shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Normally distributed float64 numbers out of the operating system's cryptographic generator."""
    from scipy.special import ndtri

    bits = np.frombuffer(os.urandom(8 * math.prod(shape)), np.uint64)
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # exact: above 0, below 1
    return sigma * ndtri(uniform).reshape(shape)
