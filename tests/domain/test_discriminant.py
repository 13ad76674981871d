"""Discriminants against Gaussian densities, and what of the anchor they are made from against its own hidden states."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import shrunk_covariance

from flexolmo_megatron.domain.discriminant import SHRINKAGE, PublicStates, public_states
from flexolmo_megatron.domain.embed import domain_vector
from flexolmo_megatron.domain.privacy import GaussianMechanism
from flexolmo_megatron.errors import FlexOlmoError

TEXTS = ["a short one", "a longer text, which is cut into pieces: " + "words " * 30, "", "the third"]


def test_the_logit_is_the_log_likelihood_ratio():
    """rtol 1e-9: float64, another way to invert."""
    random = np.random.default_rng(3)
    factors = random.normal(size=(2, 5, 5))
    covariance_Lhh = factors @ factors.transpose(0, 2, 1)
    public_Lh, own_Lh, states_nh = random.normal(size=(2, 5)), random.normal(size=(2, 5)), random.normal(size=(7, 5))
    rows_Lh, biases_L = PublicStates(public_Lh, covariance_Lhh).discriminants(own_Lh)
    assert (biases_L < 0).tolist() == [True, False], "the seed shows both cases"
    for layer in range(2):
        shrunk = shrunk_covariance(covariance_Lhh[layer], shrinkage=SHRINKAGE)
        expected = (multivariate_normal.logpdf(states_nh, own_Lh[layer], shrunk)
                    - multivariate_normal.logpdf(states_nh, public_Lh[layer], shrunk))
        logits_n = states_nh @ rows_Lh[layer] + biases_L[layer]
        if layer == 0:
            np.testing.assert_allclose(logits_n, expected, rtol=1e-9)
            continue
        # A bias above 0 is not used: the row has taken it over, for states whose component along the middle of the two
        # means, in units of the covariance, is that of the middle itself.
        middle_h = (public_Lh[layer] + own_Lh[layer]) / 2
        towards_h = np.linalg.solve(shrunk, middle_h)
        there_nh = states_nh - ((states_nh @ towards_h / (middle_h @ towards_h) - 1)[:, None]) * middle_h
        expected = (multivariate_normal.logpdf(there_nh, own_Lh[layer], shrunk)
                    - multivariate_normal.logpdf(there_nh, public_Lh[layer], shrunk))
        np.testing.assert_allclose(there_nh @ rows_Lh[layer], expected, rtol=1e-9)


def test_public_states_count_each_document_the_same(embedder):
    """rtol 1e-4: fp32 products, of pieces in batches of another size."""
    states = public_states(embedder, TEXTS, 2)
    means, seconds = [], []
    for text in filter(None, TEXTS):
        parts = []
        tokens = embedder.tokenizer.encode(text)[: embedder.max_tokens]
        for start in range(0, len(tokens), 64):
            parts.append(_states(embedder, tokens[start : start + 64]))
        states_LTh = torch.cat(parts, dim=1).double()
        means.append(states_LTh.mean(1))
        seconds.append(torch.einsum("lth,ltk->lhk", states_LTh, states_LTh) / states_LTh.shape[1])
    mean_Lh = torch.stack(means).mean(0)
    covariance_Lhh = torch.stack(seconds).mean(0) - torch.einsum("lh,lk->lhk", mean_Lh, mean_Lh)
    np.testing.assert_allclose(states.mean_Lh, mean_Lh, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(states.covariance_Lhh, covariance_Lhh, rtol=1e-4, atol=1e-5)


def test_a_discriminant_holds_what_drift_is_measured_by(embedder):
    """rtol 1e-5: fp32 in the file."""
    public, own = public_states(embedder, TEXTS, 2), [TEXTS[0], TEXTS[3]]
    vector = domain_vector(embedder, own, hidden_size=public.mean_Lh.shape[1], dense_digest="0" * 64, seed=0,
                           public=public)
    np.testing.assert_allclose(vector.moments[0], embedder.embed(own).mean(0), rtol=1e-5)
    for layer, covariance_hh in enumerate(public.covariance_Lhh):
        variance_h = np.diag(shrunk_covariance(covariance_hh, shrinkage=SHRINKAGE))
        np.testing.assert_allclose(vector.moments[1, layer], variance_h**0.5, rtol=1e-5)


def test_a_private_mean_makes_no_discriminant(embedder):
    public = public_states(embedder, TEXTS, 2)
    with pytest.raises(FlexOlmoError, match="^a private mean is no mean of hidden states: expected no noise with pub"):
        domain_vector(embedder, TEXTS[:1], hidden_size=public.mean_Lh.shape[1], dense_digest="0" * 64, seed=0,
                      privacy=GaussianMechanism(4.0, 1e-6, 1.0), public=public)


def test_a_stopped_pass_goes_on(embedder, tmp_path, monkeypatch):
    """rtol 1e-5: the batches are others."""
    monkeypatch.setattr("flexolmo_megatron.domain.sample_pass.SAVE_INTERVAL", 0)
    expected, read = public_states(embedder, TEXTS, 3), []
    add_moments = embedder.add_moments

    def stop(texts, *sums):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(texts)
        add_moments(texts, *sums)

    file = tmp_path / "v.npz.public.state"
    monkeypatch.setattr(embedder, "add_moments", stop)
    with pytest.raises(KeyboardInterrupt):
        public_states(embedder, TEXTS, 1, file)
    monkeypatch.setattr(embedder, "add_moments", lambda texts, *sums: read.append(texts) or add_moments(texts, *sums))
    states = public_states(embedder, TEXTS, 1, file)
    assert sorted(text for texts in read for text in texts) == sorted(filter(None, TEXTS)), "each document once"
    np.testing.assert_allclose(states.mean_Lh, expected.mean_Lh, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(states.covariance_Lhh, expected.covariance_Lhh, rtol=1e-5, atol=1e-6)


def _states(embedder, tokens: list[int]) -> torch.Tensor:
    """fp32 `[L, T, h]`, of one piece by itself."""
    found = []
    handles = [layer.mlp.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0][:, 0].detach()))
               for layer in embedder.gpt.decoder.layers]
    with torch.no_grad():
        embedder.gpt(torch.tensor([tokens]), torch.arange(len(tokens))[None], attention_mask=None)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_a_document_is_embedded_piece_by_piece(embedder):
    (rows_Lh,) = embedder.embed(TEXTS[1:2])
    tokens = embedder.tokenizer.encode(TEXTS[1])[: embedder.max_tokens]
    assert len(tokens) > 64
    expected = torch.cat([_states(embedder, tokens[start : start + 64]) for start in range(0, len(tokens), 64)], dim=1)
    np.testing.assert_allclose(rows_Lh, expected.mean(1), rtol=1e-4, atol=1e-6)
    assert np.isnan(embedder.embed([""])).all()


def test_no_public_document_has_a_token(embedder):
    with pytest.raises(FlexOlmoError, match="^none of 2 public documents has a token: expected at least one$"):
        public_states(embedder, ["", ""], 2)


def test_public_documents_without_variance(embedder):
    with pytest.raises(FlexOlmoError, match="^the public documents' hidden states in layer 0 have the variance"):
        public_states(embedder, ["x"], 2)


@pytest.fixture(scope="module")
def embedder():
    """An anchor whose longest sequence is 64 tokens, reading 150 of a document."""
    from flexolmo_megatron.domain.anchor import AnchorEmbedder
    from tests.random_models import SIZES, random_model

    return AnchorEmbedder(random_model("dense", sizes=replace(SIZES, max_position_embeddings=64)), "0" * 64, 150)
