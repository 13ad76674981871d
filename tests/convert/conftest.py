"""Small random models, as transformers saves them and as lazy models."""

from pathlib import Path

import pytest
import torch
import transformers

from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, Kind, ModelCard
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.names import expected_tensors

SIZES = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 7}


def save_pretrained(directory: Path, experts: int = 0, groups: int = 4, top_k: int = 2, seed: int = 0,
                    dtype: torch.dtype = torch.float32, **options) -> Path:
    """Save a random Olmo2 (experts = 0) or FlexOlmo model with transformers."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_key_value_heads": groups}
    if experts:
        config = transformers.FlexOlmoConfig(**sizes, num_experts=experts, num_experts_per_tok=min(top_k, experts))
        model = transformers.FlexOlmoForCausalLM(config)
    else:
        model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes))
    for parameter in model.parameters():  # norms too: their initial ones would hide an exchange
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(directory, **options)
    return directory


def lazy_model(kind: Kind = "moe", seed: int = 0, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = (),
               **sizes) -> LazyModel:
    """A random model in memory."""
    config = ModelConfig(**{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 24, "num_attention_heads": 4,
                            "num_query_groups": 2, "vocab_size": 53, "max_position_embeddings": 64,
                            **({"num_experts": 3, "top_k": 2} if kind == "moe" else {}),
                            **({"num_experts": 2, "top_k": 2} if kind == "pair" else {}), **sizes})
    names = names or (PUBLIC, "code", "maths", "law", "news")[:config.num_experts]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config, kind).items():
        value = torch.randn(shape, generator=generator).to(torch.float32 if name.endswith("bias") else dtype)
        tensors[name] = LazyTensor(value.dtype, shape, value.clone)
    card = ModelCard(kind, config, [ExpertRecord(name, owner=f"owner of {name}") for name in names],
                     anchor_digest="ab" * 32, training={"tokens": 17})
    return LazyModel(card, tensors)


def assert_same_tensors(found: LazyModel, expected: LazyModel) -> None:
    """Names, dtypes, shapes and every bit."""
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        value, wanted = found.tensors[name].read(), tensor.read()
        assert found.tensors[name].dtype == value.dtype == wanted.dtype, name
        assert found.tensors[name].shape == tuple(value.shape) == tuple(wanted.shape), name
        assert value.is_contiguous(), name
        assert torch.equal(value, wanted), name


@pytest.fixture
def flex_olmo(tmp_path: Path) -> Path:
    """A FlexOlmo directory with 3 experts, grouped-query attention."""
    return save_pretrained(tmp_path / "flex_olmo", experts=3, groups=2)


@pytest.fixture
def olmo2(tmp_path: Path) -> Path:
    """A dense Olmo2 directory."""
    return save_pretrained(tmp_path / "olmo2")
