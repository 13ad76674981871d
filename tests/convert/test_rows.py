"""Sets of router rows: which one is used where experts are left out, what is kept of the others, and their file."""

import json
import re
from dataclasses import replace

import pytest
import torch

from flexolmo_megatron.config.card import ModelCard, RowSet
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import exclude_experts, open_model, save_model, select_experts
from flexolmo_megatron.convert.rows import ROWS_FILE, choose, describe_choice, is_row, untuned, use_rows, without_bias
from flexolmo_megatron.convert.safetensors_io import open_file
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest
from tests.random_models import lazy_model, random_model, tensors_of

OWNERS = ["code", "math", "law"]
SETS = [RowSet("tuned", OWNERS, ["code", "math"]), RowSet("without-code", ["math", "law"], ["math"]),
        RowSet("without-math", ["code", "law"], ["code"]), RowSet("untuned")]


def tuned_model(bias: bool = False) -> tuple[LazyModel, LazyModel]:
    """An untuned model of four experts, and the same with random rows as its tuned sets."""
    merged = random_model("moe", 4, 2, bias=bias)
    rows = {rows.name: {name: tensor for name, tensor in random_model("moe", 4, 2, seed=seed, bias=bias).tensors.items()
                        if is_row(name)} for seed, rows in enumerate(SETS[:-1], 1)}
    rows["untuned"] = {name: tensor for name, tensor in merged.tensors.items() if is_row(name)}
    first = rows.pop("tuned")
    return merged, LazyModel(replace(merged.card, row_sets=SETS), merged.tensors | first, rows)


@pytest.mark.parametrize(("excluded", "choice", "expected"), [
    ([], "strict", "tuned"), ([], "tuned", "tuned"), ([], "untuned", "untuned"),
    (["math"], "strict", "without-math (strict)"), (["math"], "tuned", "tuned (expert-only)"),
    (["math"], "untuned", "untuned (strict)"), (["code"], "strict", "without-code (strict)"),
    (["law"], "strict", "untuned (strict)"), (["code", "math"], "strict", "untuned (strict)"),
])
def test_choice_of_rows(excluded, choice, expected):
    assert describe_choice(choose(SETS, excluded, choice), excluded) == expected


def test_no_choice_without_tuning_and_no_other_choice():
    assert choose([], ["math"]) is None and describe_choice(None, ["math"]) == ""
    with pytest.raises(FlexOlmoError, match="rows = 'all': expected one of strict, tuned, untuned"):
        choose(SETS, [], "all")


def same(a: LazyModel, b: LazyModel) -> bool:
    return model_digest(a) == model_digest(b)


def test_left_out_experts_take_the_sets_along_that_they_have_shaped():
    merged, tuned = tuned_model()
    rest = exclude_experts(tuned, ["math"])
    assert [rows.name for rows in rest.card.row_sets] == ["without-math", "untuned"]
    assert rest.card.expert_names == ["public", "code", "law"] and set(rest.other_rows) == {"untuned"}
    key = "model.layers.1.mlp.gate.weight"
    assert torch.equal(rest.tensors[key].read(), tuned.other_rows["without-math"][key].read()[[0, 1, 3]])
    assert same(untuned(rest), exclude_experts(merged, ["math"]))
    assert exclude_experts(rest, ["code"]).card.row_sets == []


def test_without_a_set_of_its_own_it_is_the_model_that_never_had_the_expert():
    merged, tuned = tuned_model()
    for names in (["law"], ["code", "math"]):
        rest, never = exclude_experts(tuned, names), exclude_experts(merged, names)
        assert same(rest, never) and rest.card == never.card and not rest.other_rows


def test_tuned_rows_are_kept_by_choice_and_stay_known_as_such():
    _, tuned = tuned_model()
    rest = exclude_experts(tuned, ["math"], "tuned")
    assert [rows.name for rows in rest.card.row_sets] == ["tuned", "without-math", "untuned"]
    assert rest.card.row_sets[0].depends_on(["math"])
    key = "model.layers.0.mlp.gate.weight"
    assert torch.equal(rest.tensors[key].read(), tuned.tensors[key].read()[[0, 1, 3]])


def test_the_anchor_within_is_the_untuned_one():
    merged, tuned = tuned_model()
    assert same(select_experts(tuned, []), select_experts(merged, []))


def test_using_another_set_loses_none():
    _, tuned = tuned_model()
    other = use_rows(tuned, "untuned")
    assert [rows.name for rows in other.card.row_sets] == ["untuned", "tuned", "without-code", "without-math"]
    again = use_rows(other, "tuned")
    assert same(again, tuned) and set(again.other_rows) == set(tuned.other_rows)


@pytest.mark.parametrize("format", ["megatron", "hf"])
@pytest.mark.parametrize("bias", [False, True])
def test_all_sets_are_written_and_read(tmp_path, format, bias):
    _, tuned = tuned_model(bias)
    save_model(tuned, tmp_path / "model", format, drop_bias=True)
    expected = without_bias(tuned) if format == "hf" else tuned
    found = open_model(tmp_path / "model")
    assert found.card.row_sets == SETS
    for rows in SETS:
        assert same(use_rows(found, rows.name), use_rows(expected, rows.name))
    assert not any(path.suffix == ".safetensors" and "untuned" in str(open_file(path)) for path in tmp_path.iterdir()
                   if path.is_file())


def test_transformers_loads_an_export_with_its_own_rows(tmp_path):
    from transformers import AutoModelForCausalLM

    _, tuned = tuned_model()
    save_model(tuned, tmp_path / "hf", "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    key = "model.layers.0.mlp.gate.weight"
    assert torch.equal(loaded[key], tuned.tensors[key].read())


def test_nothing_is_written_for_a_model_that_was_not_tuned(tmp_path):
    merged, _ = tuned_model()
    save_model(merged, tmp_path / "model", "megatron")
    assert not (tmp_path / "model" / ROWS_FILE).exists()


@pytest.fixture
def saved(tmp_path):
    save_model(tuned_model()[1], tmp_path / "model", "megatron")
    return tmp_path / "model"


def test_a_missing_or_damaged_file_is_refused(saved):
    data = (saved / ROWS_FILE).read_bytes()
    (saved / ROWS_FILE).write_bytes(data[:-1])
    with pytest.raises(FlexOlmoError, match=f"{ROWS_FILE} is truncated"):
        open_model(saved)
    (saved / ROWS_FILE).unlink()
    with pytest.raises(FlexOlmoError, match=f"{ROWS_FILE} does not exist"):
        open_model(saved)


def edit(saved, change):
    card = json.loads((saved / "flexolmo.json").read_text())
    change(card["row_sets"])
    (saved / "flexolmo.json").write_text(json.dumps(card))


@pytest.mark.parametrize(("change", "message"), [
    (lambda sets: sets.pop(1), "unexpected tensor without-code:model.layers.0.mlp.gate.weight"),
    (lambda sets: sets.insert(1, {"name": "without-law", "experts": ["code"], "proxies": ["code"]}),
     "tensor without-law:model.layers.0.mlp.gate.weight is missing: expected shape [4, 32]"),
    (lambda sets: sets.pop(), "row_sets without the set 'untuned'"),
    (lambda sets: sets.append(sets[1]), "row_sets[4].name = 'without-code': expected no name twice"),
    (lambda sets: sets[0].update(name="other"), "row_sets[0].name = 'other': expected untuned, tuned or without-NAME"),
    (lambda sets: sets[0].update(name=["tuned"]), "row_sets[0].name = ['tuned']"),
    (lambda sets: sets[0].update(experts="math"), "row_sets[0].experts = 'math': expected a list of expert names"),
    (lambda sets: sets[0].update(proxies=["../x"]), "row_sets[0].proxies: expert name '../x'"),
    (lambda sets: sets[0].update(proxies=["public"]), "row_sets[0].proxies: expert name 'public' is reserved"),
    (lambda sets: sets[0].update(experts=[]), "row_sets[0].experts = []: expected at least one name for the set tuned"),
    (lambda sets: sets[3].update(experts=["code"]), "row_sets[3].experts = ['code']: expected no name for the set"),
    (lambda sets: sets[0].update(training=[]), "row_sets[0].training = []: expected a JSON object"),
    (lambda sets: sets[0].update(expert=[]), "unknown field 'row_sets[0].expert' (did you mean 'experts'?)"),
    (lambda sets: sets.insert(0, 3), "row_sets[0] = 3: expected a JSON object"),
])
def test_impossible_cards_are_refused_in_one_sentence(saved, change, message):
    edit(saved, change)
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        open_model(saved)


@pytest.mark.parametrize(("kind", "experts", "count", "message"), [
    ("dense", 0, 1, "1 row_sets: expected none for a model of kind 'dense'"),
    ("pair", 2, 1, "1 row_sets: expected none for a model of kind 'pair'"),
    ("router", 3, 0, "model.num_experts = 3, 0 row_sets: expected 2 or more, and 1, for a model of kind 'router'"),
    ("router", 1, 1, "model.num_experts = 1, 1 row_sets: expected 2 or more, and 1, for"),
])
def test_sets_fit_the_kind(tmp_path, kind, experts, count, message):
    replace(random_model(kind, experts, experts).card, row_sets=[RowSet("untuned")] * count).save(tmp_path)
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        ModelCard.load(tmp_path)


def test_rows_in_another_type_are_refused(saved):
    from flexolmo_megatron.convert.safetensors_io import write_tensors

    tensors = {name: tensor.read().long() for name, tensor in open_file(saved / ROWS_FILE).items()}
    with open(saved / ROWS_FILE, "wb") as file:
        write_tensors(file, lazy_model(None, tensors).tensors)
    with pytest.raises(FlexOlmoError, match="gate.weight has dtype int64: expected numbers with a fraction"):
        open_model(saved)


def test_tensors_are_those_of_a_tuned_model():
    merged, tuned = tuned_model()
    changed = {name for name, value in tensors_of(tuned).items() if not torch.equal(value, tensors_of(merged)[name])}
    assert changed == {name for name in tuned.tensors if is_row(name)}
