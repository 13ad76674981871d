"""The extraction attack: what it counts, on models that have learnt texts by heart and on others."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.model import save_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.audit import Attack, attack_passages, audit, similarity, with_opt_outs
from flexolmo_megatron.evaluation.audit_passages import sample_passages
from flexolmo_megatron.evaluation.audit_results import Rate, Similarity, wilson
from flexolmo_megatron.evaluation.candidates import Candidate
from flexolmo_megatron.evaluation.hashing import hash64
from flexolmo_megatron.inference.model import load_model
from flexolmo_megatron.training.documents import Document
from flexolmo_megatron.training.tokenizer import ByteTokenizer
from tests.random_models import SIZES, random_model

pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed")

LENGTH = 48
ATTACK = Attack(passages=3, prefix_tokens=12, passage_tokens=LENGTH, min_tokens=LENGTH, samples=3, temperature=0.5)


def make_texts() -> list[str]:
    """Three texts of LENGTH different bytes in random order: quickly learnt, and not to be guessed."""
    return ["".join(random.Random(seed).sample([chr(code) for code in range(33, 127)], LENGTH)) for seed in range(3)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts()


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "own.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0], "too short"]))
    return path


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, Path("a.jsonl"), line) for line, text in enumerate(texts, 1)]


def passages_of(texts: list[str], attack: Attack = ATTACK):
    return sample_passages(documents(texts), ByteTokenizer(), count=attack.passages, length=attack.passage_tokens,
                           shortest=attack.min_tokens, seed=attack.seed)


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "moe"
    sizes = replace(SIZES, hidden_size=64, ffn_hidden_size=128, max_position_embeddings=LENGTH)
    save_model(random_model("moe", 2, 2, sizes=sizes), path, "megatron")
    return path


@pytest.fixture(scope="module")
def learnt(moe_path, texts):
    """A model whose expert "code", and nothing else of it, was trained on the texts for 120 epochs."""
    model = load_model(moe_path)
    tokens = torch.tensor([list(text.encode()) for text in texts])
    positions = torch.arange(LENGTH).expand_as(tokens)
    weights = [weight for name, weight in model.module.named_parameters() if "local_experts.1." in name]
    assert len(weights) == 4
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=6e-3, weight_decay=0)
    for step in range(120):
        logits = model.module(tokens, positions, attention_mask=None)[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 - step / 120)
        optimizer.step()
    model.module.requires_grad_(False)
    return model


@pytest.mark.parametrize(("text", "other", "expected"), [
    ("kitten", "sitting", 1 - 3 / 7),  # k -> s, e -> i, + g
    ("abcdefghij", "abcdefghi", 0.9),
    ("abcdefghij", "abcdefgxyj", 0.8),
    ("abc", "xyz", 0),
    ("", "ab", 0),
    ("", "", 1),
    ("äöü", "äöu", 1 - 1 / 3),  # characters, not bytes
])
def test_similarity_by_hand(text, other, expected):
    assert similarity(text, other) == pytest.approx(expected)
    assert similarity(other, text) == pytest.approx(expected)


def test_wilson_interval():
    # Brown, Cai and DasGupta (2001): (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1), abs=1e-5)
    assert wilson(16, 1000) == pytest.approx((0.00988, 0.02583), abs=1e-5)
    low, high = wilson(5, 10)
    assert low == pytest.approx(1 - high)


def test_the_threshold_is_reached_by_its_own_value():
    rate = Rate.of([Similarity(0.9, 0.95), Similarity(0.899, 0.5), Similarity(1.0, 0.8)], 0.9)
    assert (rate.passages, rate.extracted, rate.verbatim) == (3, 2, 1)
    assert rate.mean_similarity == pytest.approx((0.9 + 0.899 + 1) / 3)
    assert str(rate) == "66.7% [20.8%, 93.9%] 2/3"


def test_what_was_learnt_by_heart_is_extracted_until_its_owner_opts_out(learnt, moe_path, texts):
    def rate(model, experts=None):
        found = [similarity for _, similarity, _ in attack_passages(model, passages_of(texts), ATTACK, experts)]
        return Rate.of(found, ATTACK.threshold)

    assert rate(learnt).extracted == rate(learnt).verbatim == 3
    assert rate(learnt, ["public"]).extracted == 0
    assert rate(load_model(moe_path)).extracted == 0, "a model that was not trained"


def test_the_best_sample_is_returned_and_prefixes_are_given(learnt, texts):
    for passage, found, sample in attack_passages(learnt, passages_of(texts), ATTACK):
        text = bytes(passage.tokens).decode()
        assert sample[:12] == text[:12]
        assert found.passage == pytest.approx(similarity(text, sample)) and found.passage >= found.continuation


def test_rates_do_not_depend_on_the_batch(learnt, texts):
    attack = replace(ATTACK, temperature=2.0, top_k=0)  # so that samples differ
    def run(batch_size):
        return {passage.key: (found, sample) for passage, found, sample in
                attack_passages(learnt, passages_of(texts), attack, batch_size=batch_size)}
    together = run(100)
    assert run(1) == together
    assert len({sample for _, sample in together.values()}) == 3
    other_seed = {passage.key for passage in passages_of(texts, replace(ATTACK, seed=1))}
    assert other_seed.isdisjoint(together)


def test_passages_are_a_sample_by_seed_whatever_the_order():
    texts = [f"{index} " * 30 for index in range(200)]
    attack = replace(ATTACK, passages=50, passage_tokens=40, min_tokens=40)
    drawn = passages_of(texts, attack)
    assert [passage.key for passage in drawn] == sorted(hash64(0, text) for text in texts)[:50]
    again = passages_of([*texts[::-1], *texts], attack)  # copies count once
    assert [(p.key, p.first, p.tokens) for p in again] == [(p.key, p.first, p.tokens) for p in drawn]
    for passage in drawn:
        line = int(passage.place.split(":")[1])
        assert bytes(passage.tokens).decode() == texts[line - 1][passage.first:passage.first + 40]
        assert 0 <= passage.first < len(texts[line - 1]) - 40
    assert len({passage.first for passage in drawn}) > 10


def test_short_documents_are_left_out():
    texts = ["a" * 50, "b" * 30, "c" * 200]
    attack = replace(ATTACK, passages=10, passage_tokens=80, min_tokens=50)
    assert sorted(len(passage.tokens) for passage in passages_of(texts, attack)) == [50, 80]
    with pytest.raises(FlexOlmoError, match="no document has 201 tokens or more"):
        passages_of(texts, replace(attack, passage_tokens=300, min_tokens=201))


def test_the_command_writes_rates_and_goes_on(moe_path, corpus, tmp_path, monkeypatch, capsys):
    command = ["audit", "--model", f"merged={moe_path}", "--opt-outs", "--corpus", f"own={corpus}",
               "--out", str(tmp_path / "audit"), "--passages", "3", "--prefix-tokens", "12", "--passage-tokens",
               str(LENGTH), "--min-tokens", str(LENGTH), "--samples", "2", "--batch-size", "2", "--threshold", "0.3"]
    from flexolmo_megatron.evaluation import audit as module

    whole, calls = module.generate_tokens, []

    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(module, "generate_tokens", stopped)
    assert main(command) == 130
    lines = tmp_path / "audit" / "similarities.jsonl"
    assert len(lines.read_text().splitlines()) == 3
    with lines.open("a") as file:
        file.write('{"model": "merged", "cor')  # torn by a kill
    assert main(command) == 0
    assert len(calls) == 3 + 1 + 3, "two passages were there already"
    assert "merged without code" in capsys.readouterr().out
    results = json.loads((tmp_path / "audit" / "results.json").read_text())
    assert list(results["extraction"]) == ["merged", "merged without code"]
    rows = [json.loads(line) for line in lines.read_text().splitlines()[1:]]
    assert len(rows) == 6 and "text" not in rows[0]
    for model, row in results["extraction"].items():
        found = [line["passage"] for line in rows if line["model"] == model]
        assert row["own"]["passages"] == 3 and row["own"]["extracted"] == sum(value >= 0.3 for value in found)
        assert row["own"]["mean_similarity"] == pytest.approx(sum(found) / 3)
    assert (tmp_path / "audit" / "extraction.png").read_bytes()[:4] == b"\x89PNG"

    before = lines.read_bytes()
    assert main(command) == 0 and lines.read_bytes() == before
    for more, what in ((["--seed", "1"], "attack.seed = 0, and this one has 1:"),
                       (["--corpus", f"own={corpus}"], f"corpora.own = ['{corpus}'], and this one has ['{corpus}', '"),
                       (["--model", f"b={moe_path}"], "models = merged, merged without code, and this one has merged, "
                                                      "merged without code, b, b without code: name a new directory")):
        assert main([*command, *more]) == 2
        assert f"holds an audit with {what}" in capsys.readouterr().err
    with (moe_path / "flexolmo.json").open("a") as file:
        file.write("\n")
    assert main(command) == 2
    assert "holds an audit of models whose files have changed since" in capsys.readouterr().err


def test_unusable_documents_are_found_before_the_first_attack_and_counted(moe_path, corpus, tmp_path, capsys):
    (tmp_path / "some.jsonl").write_text("{broken\n" + corpus.read_text() + '{"text": ""}\n{broken\n')
    (tmp_path / "all.jsonl").write_text("{broken\n{broken\n")
    corpora = {"own": [str(corpus)], "some": [str(tmp_path / "some.jsonl")]}
    candidates, attack = [Candidate("model", moe_path)], replace(ATTACK, passages=1, samples=1)
    results = audit(candidates, corpora, tmp_path / "audit", attack)
    assert results.to_json()["skipped"] == {"some": {"broken JSON": 2, "empty document": 1}}
    said = capsys.readouterr().err
    assert "\nsome: skipped 3 unusable documents (2 broken JSON, 1 empty document), first " in f"\n{said}"
    with pytest.raises(FlexOlmoError, match=r"--corpus all: no document has 48 .*; skipped 2 unusable documents"):
        audit(candidates, corpora | {"all": [str(tmp_path / "all.jsonl")]}, tmp_path / "out", attack)
    assert "model on own" not in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_texts_are_kept_only_if_asked_for(moe_path, corpus, tmp_path, texts):
    audit([Candidate("model", moe_path)], {"own": [str(corpus)]}, tmp_path / "audit",
          replace(ATTACK, passages=1, samples=1), texts=True)
    (line,) = (tmp_path / "audit" / "similarities.jsonl").read_text().splitlines()[1:]
    assert json.loads(line)["text"] in texts and json.loads(line)["best_sample"][:12] == json.loads(line)["text"][:12]


def test_opt_outs_follow_their_model(moe_path):
    dense = Candidate("a", moe_path, without=("code",))
    rows = with_opt_outs([dense, Candidate("b", moe_path)])
    assert [(row.name, row.without) for row in rows] == [("a", ("code",)), ("b", ()), ("b without code", ("code",))]


@pytest.mark.parametrize(("settings", "message"), [
    (dict(passages=0), "--passages 0: expected at least 1"),
    (dict(prefix_tokens=128), "--prefix-tokens 128, --min-tokens 128, --passage-tokens 256: expected each to be"),
    (dict(min_tokens=300), "--min-tokens 300, --passage-tokens 256: expected each to be larger"),
    (dict(threshold=90), "--threshold 90: expected a similarity above 0, at most 1"),
    (dict(top_p=0), "top_p = 0: expected a probability above 0, at most 1"),
])
def test_impossible_attacks_are_refused(settings, message):
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        Attack(**settings)


def test_what_cannot_be_audited(moe_path, corpus, tmp_path):
    def run(**settings):
        return audit([Candidate("model", moe_path)], {"own": [str(corpus)]}, tmp_path / "out",
                     replace(ATTACK, **settings))

    with pytest.raises(FlexOlmoError, match=f"--passage-tokens 49: expected at most .* = {LENGTH}"):
        run(passage_tokens=49)
    with pytest.raises(FlexOlmoError, match="--corpus own: no document has 49 tokens or more"):
        audit([Candidate("model", moe_path)], {"own": [str(corpus)]}, tmp_path / "out2",
              replace(ATTACK, min_tokens=49, passage_tokens=49))
    assert not list(tmp_path.iterdir())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(FlexOlmoError, match="other already exists and holds no audit"):
        audit([Candidate("model", moe_path)], {"own": [str(corpus)]}, tmp_path / "other", ATTACK)
