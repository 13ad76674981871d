"""Tiny models with a Hugging Face tokenizer of bytes, as Megatron checkpoint and as export."""

from dataclasses import replace
from pathlib import Path

import pytest

from flexolmo_megatron.convert.model import save_model
from tests.random_models import SIZES, random_model


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """"merged" (experts public, code and math) and "export", the same as a Hugging Face directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{letter: index for index, letter in enumerate(alphabet)}, "<eos>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder / "tokenizer")
    lazy = random_model("moe", 3, 2, sizes=replace(SIZES, max_position_embeddings=1024))
    lazy.card.tokenizer = {"type": "huggingface", "path": str(folder / "tokenizer")}
    save_model(lazy, folder / "merged", "megatron")
    save_model(lazy, folder / "export", "hf")
    return {"merged": folder / "merged", "export": folder / "export"}
