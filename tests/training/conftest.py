"""Fixtures shared by the tests of training."""

from pathlib import Path

import pytest

from tests.training import runs


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small byte-level BPE tokenizer in Hugging Face format: 300 ids and ``<|endoftext|>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(["the owner trains the expert on the data of the owner"] * 50, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A trained and published anchor, data and a domain vector (see runs.py)."""
    return runs.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def expert_options(world):
    """The owner's command line as a function of the output folder and further options."""
    return lambda out, *options: runs.expert_options(world, out, *options)


@pytest.fixture(scope="session")
def metrics():
    """A run's metrics.jsonl, parsed."""
    return runs.metrics
