"""The anchor as embedder, against transformers' own hidden states."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.domain.anchor import AnchorEmbedder
from flexolmo_megatron.domain.embed import domain_vector, open_embedder
from flexolmo_megatron.domain.publish import dense_digest, publish_anchor
from flexolmo_megatron.errors import FlexOlmoError

TEXTS = [
    "def f(x):\n    return x + 1\n" * 3,
    "A short one.",
    "Zürich 東京 \U0001f642",
    "The anchor is trained on public text, and every owner of data starts from it. " * 2,  # more than LONGEST
    "x",
    "12 + 30 = 42\n" * 8,
]
HIDDEN, LAYERS, LONGEST = 32, 3, 128


@pytest.fixture(scope="module")
def digest(dense):
    return dense_digest(dense)


@pytest.fixture(scope="module")
def embedder(dense, digest):
    return AnchorEmbedder(dense, digest, max_tokens=512)


@pytest.fixture(scope="module")
def published(dense, embedder, digest, tmp_path_factory):
    """The published anchor, as owners receive it."""
    vector = domain_vector(embedder, TEXTS[:3], hidden_size=HIDDEN, dense_digest=digest, seed=0)
    path = tmp_path_factory.mktemp("published") / "anchor"
    save_model(publish_anchor(dense, vector), path, "hf")
    return path


def transformers_means(path, text, max_tokens=LONGEST):
    """Mean over tokens of what each layer's ``mlp`` is given, by transformers, one document at a time: `[L, h]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].mean(dim=1)))
    with torch.no_grad():
        model(torch.tensor([list(text.encode())[:max_tokens]]))
    return torch.cat(seen).numpy()


def test_equals_transformers_hidden_states(olmo2_dir, embedder):
    embeddings = embedder.embed(TEXTS)
    assert embeddings.shape == (len(TEXTS), LAYERS, HIDDEN) and embeddings.dtype == np.float32
    for embedding, text in zip(embeddings, TEXTS, strict=True):
        if len(text) > LONGEST:
            continue
        np.testing.assert_allclose(embedding, transformers_means(olmo2_dir, text), atol=1e-4)
    # The residual stream is what it should be: not normed, and different in every layer.
    assert np.abs(np.diff(embeddings, axis=1)).max(axis=(0, 2)).min() > 0.1


def test_published_anchor_gives_exactly_the_same(published, embedder, digest):
    model = open_model(published)
    assert dense_digest(model) == digest
    ours = AnchorEmbedder(model, digest, 512).embed(TEXTS)
    np.testing.assert_array_equal(ours, embedder.embed(TEXTS))
    np.testing.assert_allclose(ours[1], transformers_means(published, TEXTS[1]), atol=1e-4)


def test_batch_and_padding_have_no_effect(embedder):
    together = embedder.embed(TEXTS)
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_array_equal(embedder.embed(TEXTS), together)


def test_max_tokens_shortens_and_pieces_are_no_longer_than_the_longest_sequence(dense, digest, embedder, olmo2_dir):
    short = AnchorEmbedder(dense, digest, max_tokens=5).embed(TEXTS[:2])
    np.testing.assert_allclose(short[1], transformers_means(olmo2_dir, TEXTS[1], 5), atol=1e-4)
    long = TEXTS[3]
    assert len(long) > LONGEST
    first, second = embedder.embed([long[:LONGEST]]), embedder.embed([long[LONGEST:]])
    share = LONGEST / len(long)
    np.testing.assert_allclose(embedder.embed([long]), share * first + (1 - share) * second, atol=1e-5)


def test_document_without_tokens_is_nan_and_leaves_the_others_alone(embedder):
    embeddings = embedder.embed(["", TEXTS[1]])
    assert np.isnan(embeddings[0]).all()
    np.testing.assert_allclose(embeddings[1], embedder.embed([TEXTS[1]])[0], atol=1e-5)
    assert np.isnan(embedder.embed([""])).all()


def test_vector_has_a_row_for_each_layer(dense, embedder, digest):
    vector = domain_vector(embedder, TEXTS, hidden_size=HIDDEN, dense_digest=digest, seed=0, batch_size=4)
    assert vector.vectors.shape == (LAYERS, HIDDEN)
    assert (vector.embedder, vector.embedder_digest, vector.documents) == ("anchor", digest, len(TEXTS))
    mean = embedder.embed(TEXTS).mean(axis=0)
    np.testing.assert_allclose(vector.vectors, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)


def test_bfloat16_anchor(dense, digest, embedder):
    half = LazyModel(dense.card, {
        name: replace(tensor, dtype=torch.bfloat16, read=lambda tensor=tensor: tensor.read().bfloat16())
        for name, tensor in dense.tensors.items()})
    embeddings = AnchorEmbedder(half, digest, 512).embed(TEXTS)
    assert embeddings.dtype == np.float32
    expected = embedder.embed(TEXTS)
    cosine = (embeddings * expected).sum(-1) / np.linalg.norm(embeddings, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.99


def test_unsuitable_anchors(dense, digest):
    card = replace(dense.card, model=replace(dense.card.model, vocab_size=200))
    with pytest.raises(FlexOlmoError) as caught:
        AnchorEmbedder(LazyModel(card, dense.tensors), digest, 512)
    assert str(caught.value) == ("the anchor's tokenizer {'type': 'byte'} has 257 ids: expected at most "
                                 "model.vocab_size = 200")
    with pytest.raises(FlexOlmoError, match="^--max-tokens 0: expected a number of at least 1$"):
        open_embedder("anchor", dense, digest, 0)
