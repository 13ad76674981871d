"""Weights of models on a text from how likely each of them finds it: softmax(-NLL / tau), with an optional top-k.

NLL and tau are in nats. Of the total over a text or prefix, tau = 1 is Bayes' rule with a flat prior: the weights are
the chances that the text comes from each model's domain (Li et al. 2022, arXiv 2208.03306).

Legend: n models, T tokens of a text.
"""

import numpy as np


def likelihood_weights(nll_nT: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    """Return softmax(-nll / temperature) over the models, of the top-k alone; `[n, T]`, float64.

    Models that tie with the k-th are kept: before its first token a text has no reason to prefer any.
    """
    scores_nT = -nll_nT.astype(np.float64) / temperature
    if top_k < len(scores_nT):
        kth_T = np.sort(scores_nT, axis=0)[-top_k]
        scores_nT = np.where(scores_nT >= kth_T, scores_nT, -np.inf)
    weights_nT = np.exp(scores_nT - scores_nT.max(axis=0))
    return weights_nT / weights_nT.sum(axis=0)


def whole_text_weights(log_probs_nT: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    """Return the weights `[n, T]` from the likelihood of the whole text, the same at each position: an oracle."""
    nll_n1 = -log_probs_nT.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.broadcast_to(likelihood_weights(nll_n1, temperature, top_k), log_probs_nT.shape)


def causal_weights(log_probs_nT: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    """Return the weights `[n, T]` at each position from the likelihood of the tokens before it."""
    before_nT = np.zeros(log_probs_nT.shape)
    np.cumsum(-log_probs_nT[:, :-1], axis=1, dtype=np.float64, out=before_nT[:, 1:])
    return likelihood_weights(before_nT, temperature, top_k)
