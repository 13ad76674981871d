"""A tiny dense anchor and documents for it."""

from pathlib import Path

import numpy as np
import pytest
import torch

HIDDEN, LAYERS = 32, 3


@pytest.fixture(scope="session")
def olmo2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Olmo2 model in Hugging Face format, whose vocabulary is that of the byte tokenizer."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    config = Olmo2Config(vocab_size=257, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                         rope_theta=500_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.2,
                         pad_token_id=None, bos_token_id=None, eos_token_id=256)
    model = Olmo2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.rand_like(weight) + 0.5)
    directory = tmp_path_factory.mktemp("olmo2")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def dense(olmo2_dir):
    """The same as a LazyModel."""
    from flexolmo_megatron.convert.model import open_model

    return open_model(olmo2_dir)


class FakeEmbedder:
    """Maps each text to a given row; counts its batches."""

    name = "fake"
    digest = "ab" * 32
    reading = "512 tokens"

    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self.rows = rows
        self.batches: list[list[str]] = []

    def embed(self, texts) -> np.ndarray:
        self.batches.append(list(texts))
        return np.stack([np.atleast_2d(self.rows[text]) for text in texts]).astype(np.float32)


@pytest.fixture
def fake_embedder():
    return FakeEmbedder
