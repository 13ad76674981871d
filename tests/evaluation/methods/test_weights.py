"""Weights from likelihoods, against fractions worked out by hand."""

import math

import numpy as np
import pytest

from flexolmo_megatron.evaluation.methods.weights import causal_weights, likelihood_weights, whole_text_weights

HALVES = np.log([[1 / 2, 1 / 2, 1 / 2], [1 / 4, 1 / 4, 1 / 4]])
"""Two models, three tokens: the text has probability 1/8 under the first one and 1/64 under the second."""


@pytest.mark.parametrize(("temperature", "first"), [(1, 8 / 9), (3, 2 / 3), (1.5, 4 / 5)])
def test_the_whole_text_weighs_its_models(temperature: float, first: float) -> None:
    weights = whole_text_weights(HALVES, temperature, 2)
    assert weights.shape == (2, 3)
    np.testing.assert_allclose(weights, [[first] * 3, [1 - first] * 3], rtol=1e-12)


def test_the_prefix_weighs_its_models() -> None:
    weights = causal_weights(HALVES, 1, 2)
    np.testing.assert_allclose(weights[0], [1 / 2, 2 / 3, 4 / 5], rtol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=0), 1)
    np.testing.assert_allclose(causal_weights(HALVES, 2, 2)[0, 2], 2 / 3, rtol=1e-12)  # (1/4 : 1/16) ** (1/2)


def test_the_prefix_knows_nothing_of_its_own_token_and_later_ones() -> None:
    changed = HALVES.copy()
    changed[:, 1:] = [[-9, -1], [-1, -20]]
    np.testing.assert_array_equal(causal_weights(changed, 1, 2)[:, :2], causal_weights(HALVES, 1, 2)[:, :2])
    assert not np.allclose(whole_text_weights(changed, 1, 2), whole_text_weights(HALVES, 1, 2))


def test_top_k_keeps_the_likeliest_and_shares_their_weight() -> None:
    nll = -np.log([[1 / 2], [1 / 8], [1 / 4]])
    np.testing.assert_allclose(likelihood_weights(nll, 1, 2), [[2 / 3], [0], [1 / 3]])
    np.testing.assert_allclose(likelihood_weights(nll, 1, 1), [[1], [0], [0]])
    np.testing.assert_allclose(likelihood_weights(nll, 1, 3), [[4 / 7], [1 / 7], [2 / 7]])


def test_before_the_first_token_all_models_are_equal_whatever_top_k_is() -> None:
    np.testing.assert_allclose(causal_weights(np.log([[0.5, 0.5], [0.1, 0.5], [0.4, 0.5]]), 1, 1),
                               [[1 / 3, 1], [1 / 3, 0], [1 / 3, 0]])


def test_long_texts_underflow_nothing() -> None:
    log_probs = np.full((2, 100_000), -5.0, np.float32)
    log_probs[1] = -5.0001
    weights = whole_text_weights(log_probs, 1, 2)
    assert weights[0, 0] == pytest.approx(1 / (1 + math.exp(-10)), rel=1e-2)
    assert np.isfinite(causal_weights(log_probs, 0.1, 1)).all()
