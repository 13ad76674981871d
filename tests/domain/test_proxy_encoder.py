"""The encoder classifier, with a tiny random BERT."""

import json

import numpy as np
import pytest
import torch

from flexolmo_megatron import cli
from flexolmo_megatron.domain.proxy_classifier import load_classifier
from flexolmo_megatron.domain.proxy_encoder import EncoderClassifier
from flexolmo_megatron.errors import FlexOlmoError

WORDS = ["sum", "prime", "proof", "ring", "vote", "team", "court", "storm", "the", "of"]
OPTIONS = {"seed": 0, "epochs": 4, "learning_rate": 3e-3, "batch_size": 8, "max_tokens": 16}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(str, range(10))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(vocab=str(folder / "vocab.txt"), eos_token="[SEP]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=32)).save_pretrained(folder)
    return folder


def texts(seed, words, number):
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice([*words, "the", "of"], chance.integers(4, 20))) for _ in range(number)]


DOCUMENTS = texts(0, WORDS[:4], 40) + texts(1, WORDS[4:8], 120)
LABELS = np.repeat([1, 0], [40, 120])


def test_learns_and_is_kept(bert, tmp_path):
    before = torch.get_rng_state()
    trained = EncoderClassifier.train(str(bert), DOCUMENTS, LABELS, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    new = texts(2, WORDS[:4], 20) + texts(3, WORDS[4:8], 20)
    logits = trained.logits(new)
    assert logits.dtype == np.float32 and ((logits > 0) == np.repeat([True, False], 20)).mean() > 0.9
    trained.save(tmp_path)
    np.testing.assert_array_equal(load_classifier("any", tmp_path).logits(new), logits)
    np.testing.assert_allclose([trained.logits([text])[0] for text in new[:5]], logits[:5], atol=1e-5)
    assert trained.describe() == {"name": bert.name, "epochs": 4, "learning_rate": 3e-3, "batch_size": 8,
                                  "max_tokens": 16}


def test_seed_decides(bert):
    options = {**OPTIONS, "epochs": 1}
    one, same = (EncoderClassifier.train(str(bert), DOCUMENTS, LABELS, **options).logits(DOCUMENTS) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    other = EncoderClassifier.train(str(bert), DOCUMENTS, LABELS, **{**options, "seed": 1}).logits(DOCUMENTS)
    assert np.abs(one - other).max() > 1e-3


def test_refusals(bert, tmp_path):
    with pytest.raises(FlexOlmoError, match=r"^cannot load the classifier '.*': expected 'linear', or the name or fol"):
        EncoderClassifier.train(str(tmp_path), DOCUMENTS, LABELS, **OPTIONS)
    with pytest.raises(FlexOlmoError, match="^--max-tokens 512: expected at most the 32 that the classifier"):
        EncoderClassifier.train(str(bert), DOCUMENTS, LABELS, **{**OPTIONS, "max_tokens": 512})
    with pytest.raises(FlexOlmoError, match=r"^the loss of the classifier bert\d* is nan: expected a finite number"):
        EncoderClassifier.train(str(bert), DOCUMENTS, LABELS, **{**OPTIONS, "learning_rate": 1e38})


def test_command(bert, tmp_path, capsys, monkeypatch):
    for name, documents in (("owner", texts(0, WORDS[:4], 40)),
                            ("public", texts(4, WORDS[:4], 10) + texts(1, WORDS[4:8], 90))):
        lines = [json.dumps({"text": f"{text} {number}"}) + "\n" for number, text in enumerate(documents)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    arguments = ["proxy", str(tmp_path / "owner.jsonl"), "--public", str(tmp_path / "public.jsonl"), "--tokens", "160",
                 "--classifier", str(bert), "--lr", "3e-3", "--epochs", "4", "--batch-size", "8", "--max-tokens", "16",
                 "--tokenizer", str(bert), "--workers", "1", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr("flexolmo_megatron.domain.proxy.run_shards", None)  # both are refused before any work
        for words, message in ((["--classifier", str(tmp_path)], "cannot load the classifier"),
                               (["--max-tokens", "512"], "--max-tokens 512: expected at most the 32 that the class")):
            assert cli.main([*arguments, str(tmp_path / "a"), *words]) == 2
            assert f"flexolmo: {message}" in capsys.readouterr().err
    assert cli.main([*arguments, str(tmp_path / "a")]) == 0
    assert f"classifier {bert.name}: held-out accuracy" in capsys.readouterr().out
    assert cli.main([*arguments, str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "proxies.jsonl").read_bytes() == (tmp_path / "b" / "proxies.jsonl").read_bytes()
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["classifier"]["learning_rate"] == 3e-3 and str(bert.parent) not in json.dumps(report)
    assert report["proxies"]["tokenizer"] == {"type": "huggingface", "path": bert.name}
    chosen = [json.loads(line)["source"] for line in (tmp_path / "a" / "proxies.jsonl").read_text().splitlines()]
    assert sum(int(source.split(":")[1]) <= 10 for source in chosen) >= len(chosen) / 2
