"""The Gaussian mechanism: its noise against the definition of differential privacy, and what it does to a vector."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest, norm

from flexolmo_megatron.domain import privacy as module
from flexolmo_megatron.domain.embed import domain_vector, mean_embedding
from flexolmo_megatron.domain.privacy import GaussianMechanism, gaussian_delta, gaussian_noise, gaussian_sigma
from flexolmo_megatron.domain.vector import load_vector, save_vector
from flexolmo_megatron.errors import FlexOlmoError

DIGEST = "cd" * 32


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_delta_is_the_one_of_the_definition(epsilon, sigma):
    """The largest P(A) - exp(epsilon) Q(A), by integrating over where the densities of N(1, s) and N(0, s) exceed."""
    # log p/q = (2x - 1) / (2 s^2) > epsilon
    start = epsilon * sigma**2 + 0.5
    p, q = norm(1, sigma), norm(0, sigma)
    expected = quad(lambda x: p.pdf(x) - math.exp(epsilon) * q.pdf(x), start, start + 30 * sigma, epsabs=1e-14)[0]
    assert gaussian_delta(sigma, epsilon) == pytest.approx(expected, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("delta", [1e-9, 1e-6, 1e-3])
def test_sigma_is_least_and_below_the_classic_bound(epsilon, delta):
    sigma = gaussian_sigma(epsilon, delta)
    assert gaussian_delta(sigma, epsilon) <= delta < gaussian_delta(sigma * (1 - 1e-6), epsilon)
    classic = math.sqrt(2 * math.log(1.25 / delta)) / epsilon  # holds for epsilon < 1: Dwork and Roth 2014, theorem A.1
    assert sigma < classic


def test_sigma_of_large_and_small_epsilon():
    assert gaussian_sigma(1.0, 1e-5) == pytest.approx(3.73, abs=0.005)
    for epsilon in (1e-6, 50.0, 2000.0):
        sigma = gaussian_sigma(epsilon, 1e-6)
        assert gaussian_delta(sigma, epsilon) <= 1e-6 < gaussian_delta(sigma * (1 - 1e-6), epsilon)


def test_noise_is_normal_and_never_the_same(monkeypatch):
    np.random.seed(0)
    first = gaussian_noise((50, 400), 2.5)
    np.random.seed(0)
    assert not np.intersect1d(first, gaussian_noise((50, 400), 2.5)).size
    assert kstest(first.ravel(), norm(0, 2.5).cdf).pvalue > 1e-6
    for byte, sign in ((b"\0", -1), (b"\xff", 1)):  # the extremes of the generator are finite
        monkeypatch.setattr(module.os, "urandom", lambda size, byte=byte: byte * size)
        extreme = gaussian_noise((1,), 1.0)[0] * sign
        assert 8 < extreme < 9


def test_sensitivity_is_reached_and_not_exceeded():
    mechanism = GaussianMechanism(1.0, 1e-6, 2.0)
    chance = np.random.default_rng(0)
    documents = mechanism.clipped(chance.standard_normal((10, 3, 5)) * 10.0 ** chance.integers(-3, 4, (10, 1, 1)))
    assert np.linalg.norm(documents, axis=2).max() == pytest.approx(2.0)
    largest = 0.0
    for _ in range(300):
        other = documents.copy()
        other[chance.integers(10)] = mechanism.clipped(chance.standard_normal((1, 3, 5)) * 100)[0]
        largest = max(largest, np.linalg.norm(other.mean(axis=0) - documents.mean(axis=0)))
    assert largest <= mechanism.sensitivity(10, 3)
    worst = np.zeros((2, 1, 3, 5))
    worst[:, 0, :, 0] = [[2.0], [-2.0]]
    assert np.linalg.norm((worst[0] - worst[1]) / 10) == pytest.approx(mechanism.sensitivity(10, 3))
    assert mechanism.sigma(10, 3) == pytest.approx(gaussian_sigma(1.0, 1e-6) * 2 * 2.0 * math.sqrt(3) / 10)


def test_clipping_keeps_what_is_short_and_zeroes_what_is_not_finite():
    rows = np.array([[[0.3, 0.4], [3.0, 4.0]], [[np.nan, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, np.inf]]], np.float32)
    clipped = GaussianMechanism(1.0, 1e-6, 1.0).clipped(rows)
    np.testing.assert_allclose(clipped, [[[0.3, 0.4], [0.6, 0.8]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], atol=1e-7)


def test_the_mean_gets_clip_and_noise(fake_embedder, monkeypatch):
    asked = []

    def noise(shape, sigma):
        asked.append((shape, sigma))
        return np.full(shape, 0.5)

    monkeypatch.setattr("flexolmo_megatron.domain.embed.gaussian_noise", noise)
    mechanism = GaussianMechanism(1.0, 1e-6, 1.0)
    rows = {"a": [[3, 4], [0, 1]], "b": [[np.nan, 0], [1, 0]]}
    mean, dropped = mean_embedding(fake_embedder(rows), ["a", "b"], 1, privacy=mechanism)
    np.testing.assert_allclose(mean, [[0.3 + 0.5, 0.4 + 0.5], [0.5, 0.5 + 0.5]], atol=1e-7)
    assert dropped == 0 and asked == [((2, 2), mechanism.sigma(2, 2))]


def test_the_vector_records_it_and_is_new_each_time(fake_embedder, tmp_path):
    rows = {text: [[1, 0, 0, 0]] for text in "abc"}
    mechanism = GaussianMechanism(20.0, 1e-6, 1.0)
    vectors = [domain_vector(fake_embedder(rows), list(rows), hidden_size=4, dense_digest=DIGEST, seed=3,
                             privacy=mechanism) for _ in range(2)]
    assert np.abs(vectors[0].vectors - vectors[1].vectors).max() > 1e-4
    assert vectors[0].vectors[0, 1] != 0 and np.linalg.norm(vectors[0].vectors) == pytest.approx(1)
    save_vector(vectors[0], tmp_path / "v.npz")
    assert load_vector(tmp_path / "v.npz").privacy == mechanism


@pytest.mark.parametrize(("values", "message"), [
    ((0.0, 1e-6, 1.0), "^epsilon = 0.0: expected a number above 0$"),
    ((float("nan"), 1e-6, 1.0), "^epsilon = nan: expected a number above 0$"),
    ((1.0, 1.0, 1.0), "^delta = 1.0: expected a number above 0 and below 1$"),
    ((1.0, 1e-6, -1.0), "^clip = -1.0: expected a number above 0$"),
    (("1", 1e-6, 1.0), "^epsilon = '1': expected a number above 0$"),
])
def test_impossible_values(values, message):
    with pytest.raises(FlexOlmoError, match=message):
        GaussianMechanism(*values)
