"""Embedding models of others. sentence-transformers is not needed here: a stand-in takes its place."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from flexolmo_megatron.domain.embed import domain_vector, open_embedder
from flexolmo_megatron.domain.text_models import (
    GRITLM_INSTRUCTION,
    GritLMEmbedder,
    SentenceTransformerEmbedder,
    is_gritlm,
)
from flexolmo_megatron.errors import FlexOlmoError

DIGEST = "cd" * 32
TEXTS = ["the owner trains the expert", "data", "12 + 30 = 42, and so on, and so on, and so on"]


class FakeSentenceTransformer(torch.nn.Module):
    """Embeds a text as its counts of eight letters."""

    def __init__(self, name, device=None, trust_remote_code=True):
        super().__init__()
        assert not trust_remote_code
        if name == "no/such":
            raise OSError("no/such is not a model\nand a long explanation")
        self.weight = torch.nn.Parameter(torch.arange(8.0) + len(name))
        self.max_seq_length = 256
        self.pooling = torch.nn.Module()
        if "new" in name:
            self.pooling.pooling_mode = ("mean", "cls")
        else:
            self.pooling.get_pooling_mode_str = lambda: "cls" if "cls" in name else "cls+mean"
        self.prompts, self.default_prompt_name = {"query": "find: "}, "query" if "prompt" in name else None

    def encode(self, texts, *, batch_size, normalize_embeddings, convert_to_numpy, show_progress_bar):
        assert batch_size == len(texts) and convert_to_numpy and normalize_embeddings and not show_progress_bar
        counts = np.array([[text.count(letter) for letter in "abcdefgh"] for text in texts], np.float32)
        with np.errstate(invalid="ignore"):
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def sentence_transformers(monkeypatch):
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeSentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


def test_sentence_transformers_model(sentence_transformers, dense):
    embedder = open_embedder("some/model", dense, DIGEST, max_tokens=64)
    assert isinstance(embedder, SentenceTransformerEmbedder)
    assert embedder.name == "some/model" and embedder._model.max_seq_length == 64
    embeddings = embedder.embed(["abba", "hh"])
    assert embeddings.shape == (2, 1, 8) and embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings[1, 0], [0, 0, 0, 0, 0, 0, 0, 1])
    assert SentenceTransformerEmbedder("some/model", 1000)._model.max_seq_length == 256
    assert SentenceTransformerEmbedder("some/model", 64).digest == embedder.digest
    assert SentenceTransformerEmbedder("other/model", 64).digest != embedder.digest  # other weights
    # One row for all layers, of the hidden size; a document whose embedding is not finite is left out.
    vector = domain_vector(embedder, ["abba", "hh", "zz"], hidden_size=32, dense_digest=DIGEST, seed=0)
    assert vector.vectors.shape == (1, 32) and (vector.documents, vector.dropped) == (2, 1)
    assert (vector.embedder_digest, vector.reading) == (embedder.digest, "64 tokens, cls+mean pooling")


@pytest.mark.parametrize("name, expected", [
    ("cls", "64 tokens, cls pooling"), ("new", "64 tokens, cls+mean pooling"), ("old", "64 tokens, cls+mean pooling"),
    ("old prompt", "64 tokens, cls+mean pooling, after 'find: '"),
])
def test_what_decides_an_embedding_beside_the_weights(sentence_transformers, name, expected):
    assert SentenceTransformerEmbedder(name, 64).reading == expected


def test_sentence_transformers_cannot_load(sentence_transformers):
    with pytest.raises(FlexOlmoError) as caught:
        SentenceTransformerEmbedder("no/such", 64)
    assert str(caught.value) == ("cannot load the embedder 'no/such': expected 'anchor', or the name or folder of a "
                                 "sentence-transformers or GritLM model (no/such is not a model)")


def test_missing_packages_name_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(FlexOlmoError, match="^the embedder 'a/b' needs sentence-transformers; "
                                            "install it with: pip install sentence-transformers$"):
        SentenceTransformerEmbedder("a/b", 64)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FlexOlmoError, match="^the embedder 'GritLM/x' needs transformers; install it with"):
        GritLMEmbedder("GritLM/x", 64)


@pytest.fixture(scope="module")
def gritlm_dir(tmp_path_factory):
    """A random model of GritLM's kind: Mistral, a tokenizer that begins texts with a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=258, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, sliding_window=8))
    directory = tmp_path_factory.mktemp("model") / "GritLM-tiny"
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


def reference(directory, text, max_tokens):
    """One document alone, by transformers' Mistral with attention written out and without any mask."""
    from transformers import AttentionInterface, AutoTokenizer, MistralModel

    def everything_visible(module, query, key, value, attention_mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("everything_visible", everything_visible)
    model = MistralModel.from_pretrained(directory, attn_implementation="everything_visible").eval()
    tokens = AutoTokenizer.from_pretrained(directory)(GRITLM_INSTRUCTION + text)["input_ids"][:max_tokens]
    with torch.no_grad():
        hidden = model(torch.tensor([tokens])).last_hidden_state[0]
    mean = hidden[1 + len(GRITLM_INSTRUCTION):].mean(dim=0)  # one token for each byte here, and <s>
    return (mean / mean.norm()).numpy()


def test_gritlm_pools_the_documents_tokens_with_attention_in_both_directions(gritlm_dir, dense):
    embedder = open_embedder(str(gritlm_dir), dense, DIGEST, max_tokens=40)
    assert isinstance(embedder, GritLMEmbedder) and embedder.name == "GritLM-tiny"
    assert embedder.reading == "40 tokens, mean pooling, after '<|embed|>\\n'"
    embeddings = embedder.embed(TEXTS)  # of different lengths, the last one cut
    assert embeddings.shape == (3, 1, 24) and embeddings.dtype == np.float32
    for embedding, text in zip(embeddings, TEXTS, strict=True):
        np.testing.assert_allclose(embedding[0], reference(gritlm_dir, text, 40), atol=1e-5)
        np.testing.assert_allclose(embedder.embed([text])[0], embedding, atol=1e-5)
    assert GritLMEmbedder(str(gritlm_dir), 40).digest == embedder.digest


def test_gritlm_document_without_tokens_is_dropped(gritlm_dir):
    embedder = GritLMEmbedder(str(gritlm_dir), 64)
    assert np.isnan(embedder.embed(["", "data"])[0]).all()
    vector = domain_vector(embedder, ["", "data"], hidden_size=32, dense_digest=DIGEST, seed=0)
    assert (vector.documents, vector.dropped) == (1, 1)
    with pytest.raises(FlexOlmoError, match="^--max-tokens 11: expected more than the 11 tokens of GritLM's"):
        GritLMEmbedder(str(gritlm_dir), 11)


def test_which_models_are_gritlm(tmp_path, gritlm_dir):
    assert is_gritlm("GritLM/GritLM-7B") and is_gritlm("someone/gritlm-8x7b")
    assert not is_gritlm("BAAI/bge-small-en-v1.5")
    assert is_gritlm(str(gritlm_dir))
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    assert not is_gritlm(str(renamed))
    (renamed / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_gritlm7b.MistralModel"}}))
    assert is_gritlm(str(renamed))
    with pytest.raises(FlexOlmoError, match=f"^cannot load the embedder '{renamed}': expected 'anchor', or"):
        GritLMEmbedder(str(renamed), 64)
