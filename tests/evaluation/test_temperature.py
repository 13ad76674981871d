"""A merged model's temperature: what is chosen, what is written, and what holds when an owner is left out."""

import json
from dataclasses import replace

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.config.card import PUBLIC, RowSet
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.convert.rows import untuned
from flexolmo_megatron.evaluation.perplexity import evaluate_documents
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.inference.model import load_model
from tests.random_models import SIZES, lazy_model, random_model, tensors_of

TEXTS = ["It was a dark night.", "Long " * 20, "Kurz, aber mit Ümläuten."]
TEMPERATURES = [0.25, 1.0, 3.0]


def scaled(model: LazyModel, temperature: float) -> LazyModel:
    """The definition: rows and biases over the temperature."""
    return lazy_model(model.card, {name: value / temperature if ".mlp.gate." in name else value
                                   for name, value in tensors_of(model).items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("temperature")
    merged = random_model("moe", 3, 2, bias=True, sizes=replace(SIZES, vocab_size=257))
    save_model(merged, folder / "merged", "megatron")
    (folder / "public.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "{\n")
    assert main(["calibrate", f"{folder}/merged", "--public", f"{folder}/public.jsonl", "--out", f"{folder}/out",
                 "--temperatures", *map(str, TEMPERATURES)]) == 0
    return folder


def test_the_best_temperature_of_each_set_of_experts_is_kept(folder, tmp_path):
    merged, out = open_model(folder / "merged"), open_model(folder / "out")
    owners = merged.card.expert_names[1:]
    names = {"tuned": owners, **{f"without-{left}": [name for name in owners if name != left] for left in owners}}
    assert [rows.name for rows in out.card.row_sets] == [*names, "untuned"]
    models = {}
    for temperature in TEMPERATURES:
        save_model(scaled(merged, temperature), tmp_path / str(temperature), "megatron")
        models[temperature] = load_model(tmp_path / str(temperature))
    for rows in out.card.row_sets[:-1]:
        bits = {temperature: evaluate_documents(model, TEXTS, experts=[PUBLIC, *names[rows.name]]).bits_per_byte
                for temperature, model in models.items()}
        assert rows == RowSet(rows.name, names[rows.name], [], {"temperature": min(bits, key=bits.get)})
    assert any(rows.training["temperature"] != 1 for rows in out.card.row_sets[:-1])

    model, tokens = load_model(folder / "out"), torch.tensor([[5, 6, 7, 8]])
    for left in (None, *owners):
        kept = None if left is None else model.experts_without(left)
        rows = model.row_set(kept)
        chosen = models[rows.training["temperature"]]
        assert left is None or model.rows_used(kept) == f"without-{left} (strict)"
        torch.testing.assert_close(model.logits(tokens, kept), chosen.logits(tokens, kept), rtol=0, atol=1e-6)
    assert model_digest(untuned(out)) == model_digest(merged)


def test_progress_and_what_was_skipped_are_said(folder, tmp_path, capsys):
    assert main(["calibrate", f"{folder}/merged", "--public", f"{folder}/public.jsonl", "--out", f"{tmp_path}/out",
                 "--temperatures", "1"]) == 0
    lines = capsys.readouterr().err
    assert "skipped 1 unusable document (1 broken JSON)" in lines
    assert lines.count(", temperature 1: ") == 3  # with all experts, and without each of two owners


def test_bad_input_is_a_sentence(folder, tmp_path, capsys):
    def refused(message, *words):
        assert main(["calibrate", *map(str, words), "--public", f"{folder}/public.jsonl"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()

    refused("out already exists", folder / "merged", "--out", folder / "out")
    refused("a moe model with 3 experts and a tuned router: expected a merged model", folder / "out", "--out",
            tmp_path / "x")
    refused("--max-bad -1: expected a number of at least 0", folder / "merged", "--max-bad", -1, "--out",
            tmp_path / "x")
    refused("temperatures = [0.0]: expected numbers above 0", folder / "merged", "--out", tmp_path / "x",
            "--temperatures", 0)
    refused("--max-bytes 0: expected at least 1", folder / "merged", "--out", tmp_path / "x", "--max-bytes", 0)
    refused("nothing does not exist", tmp_path / "nothing", "--out", tmp_path / "x")
