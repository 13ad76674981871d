import numpy as np
import pytest
import torch

from flexolmo_megatron.config.card import PUBLIC
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.domain.publish import dense_digest, public_rows, publish_anchor
from flexolmo_megatron.domain.vector import DomainVector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest

HIDDEN, LAYERS = 32, 3


def make_vector(rows, width=HIDDEN):
    vectors = np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)
    return DomainVector(vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True), embedder="anchor",
                        embedder_digest="ab" * 32, dense_digest="ab" * 32, documents=10, dropped=0, seed=0, norm=1.0)


@pytest.mark.parametrize("rows", [1, LAYERS])
def test_published_anchor(dense, rows):
    vector = make_vector(rows)
    published = publish_anchor(dense, vector)
    card = published.card
    assert (card.kind, card.model.num_experts, card.model.top_k, card.expert_names) == ("moe", 1, 1, [PUBLIC])
    assert card.experts[0].router == {"embedder": "anchor@abababababab", "documents": 10}
    assert card.tokenizer == dense.card.tokenizer and card.anchor_digest is None
    np.testing.assert_array_equal(public_rows(published).numpy(), np.broadcast_to(vector.vectors, (LAYERS, HIDDEN)))
    # Everything else is bitwise the dense model's.
    back = as_dense(published)
    assert back.card.model == dense.card.model
    assert back.tensors.keys() == dense.tensors.keys()
    assert all(torch.equal(back.tensors[name].read(), tensor.read()) for name, tensor in dense.tensors.items())
    assert dense_digest(published) == dense_digest(dense) == model_digest(dense)
    # The digest that packages name covers the row.
    other = publish_anchor(dense, make_vector(1 if rows > 1 else LAYERS))
    assert len({model_digest(published), model_digest(other), model_digest(dense)}) == 3


@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_logits_equal_the_dense_models(dense, olmo2_dir, tmp_path, format):
    import flexolmo_megatron

    save_model(publish_anchor(dense, make_vector(LAYERS)), tmp_path / "anchor", format)
    tokens = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(0))
    published, plain = (flexolmo_megatron.load_model(path) for path in (tmp_path / "anchor", olmo2_dir))
    assert published.expert_names == [PUBLIC]
    torch.testing.assert_close(published.logits(tokens), plain.logits(tokens), atol=1e-6, rtol=1e-6)


def test_hugging_face_directory_is_for_transformers_and_holds_no_pickle(dense, olmo2_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    save_model(publish_anchor(dense, make_vector(LAYERS)), tmp_path / "anchor", "hf")
    assert {path.suffix for path in (tmp_path / "anchor").iterdir()} == {".json", ".safetensors"}
    tokens = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
                  for path in (tmp_path / "anchor", olmo2_dir)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_rows_have_the_models_dtype(dense):
    half = LazyModel(dense.card, {name: type(tensor)(torch.bfloat16, tensor.shape, tensor.read)
                                  for name, tensor in dense.tensors.items()})
    tensor = publish_anchor(half, make_vector(1)).tensors["model.layers.2.mlp.gate.weight"]
    assert (tensor.dtype, tensor.shape, tensor.read().dtype) == (torch.bfloat16, (1, HIDDEN), torch.bfloat16)


def test_refusals(dense, tmp_path):
    published = publish_anchor(dense, make_vector(1))
    with pytest.raises(FlexOlmoError, match="^only a dense model can be published as an anchor, this is a moe model "
                                            "with the experts public$"):
        publish_anchor(published, make_vector(1))
    with pytest.raises(FlexOlmoError, match="^the domain vector has 2 rows of 32 numbers: expected 3 or 1 of 32"):
        publish_anchor(dense, make_vector(2))
    with pytest.raises(FlexOlmoError, match="^the domain vector has 1 row of 16 numbers: expected 3 or 1 of 32"):
        publish_anchor(dense, make_vector(1, 16))
    assert public_rows(dense) is None
    save_model(published, tmp_path / "anchor", "hf")
    assert open_model(tmp_path / "anchor").card == published.card
