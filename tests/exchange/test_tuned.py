"""Merging, removing, exporting and inspecting a model whose router was tuned."""

import json
from dataclasses import replace

import pytest

from flexolmo_megatron.cli import main
from flexolmo_megatron.config.card import RowSet
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.convert.rows import is_row, use_rows
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.exchange.merge import merge, remove
from flexolmo_megatron.exchange.verify import AnchorReference, verify

SETS = [RowSet("tuned", ["a", "b"], ["a", "b"]), RowSet("without-a", ["b"], ["b"]), RowSet("untuned")]


@pytest.fixture
def verified(make_package, anchor, digest):
    reference = AnchorReference.of(anchor, digest)
    return lambda name, *args, **options: verify(make_package(name, *args, **options), reference)


def tune(merged: LazyModel) -> LazyModel:
    """The model with rows in its sets that are multiples of the untuned ones."""
    def times(factor: float) -> dict:
        return {name: replace(tensor, read=lambda tensor=tensor: tensor.read() * factor)
                for name, tensor in merged.tensors.items() if is_row(name)}

    return LazyModel(replace(merged.card, row_sets=SETS), merged.tensors | times(2),
                     {"without-a": times(3), "untuned": times(1)})


@pytest.fixture
def packages(verified):
    return [verified("a", 1, bias=True), verified("b", 2)]


@pytest.fixture
def merged(anchor, packages):
    return merge(anchor, packages)


def test_removing_from_a_tuned_model_is_never_having_merged(anchor, packages, merged):
    ours = remove(tune(merged), ["b"])
    never = merge(anchor, packages[:1])
    assert ours.card == never.card and model_digest(ours) == model_digest(never) and not ours.other_rows


def test_removing_keeps_the_set_without_the_owner_and_drops_a_bias_of_zeros_in_all_sets(merged):
    ours = remove(tune(merged), ["a"])  # of which alone the bias was
    assert [rows.name for rows in ours.card.row_sets] == ["without-a", "untuned"] and not ours.card.model.router_bias
    assert not [name for rows in (ours.tensors, *ours.other_rows.values()) for name in rows if name.endswith("bias")]
    assert model_digest(use_rows(ours, "untuned")) == model_digest(remove(merged, ["a"]))


def test_an_expert_that_joins_makes_the_rows_untuned(merged, verified):
    c = verified("c", 3)
    ours, never = merge(tune(merged), [c]), merge(merged, [c])
    assert ours.card == never.card and model_digest(ours) == model_digest(never) and not ours.other_rows


@pytest.fixture
def path(merged, tmp_path):
    save_model(tune(merged), tmp_path / "tuned", "megatron")
    return tmp_path / "tuned"


def test_the_command_says_that_rows_are_untuned_again(path, make_package, tmp_path, capsys):
    assert main(["merge", "--model", str(path), "--add", str(make_package("c", 3)), "--out", f"{tmp_path}/out"]) == 0
    assert "note: an expert that joins was not tuned with the others, so the merged model has the untuned" in (
        capsys.readouterr().err
    )
    assert open_model(tmp_path / "out").card.row_sets == []


@pytest.mark.parametrize(("rows", "expected"), [("strict", []), ("tuned", ["tuned", "without-a", "untuned"]),
                                                ("untuned", [])])
def test_removing_by_command_with_a_choice_of_rows(path, tmp_path, rows, expected):
    assert main(["merge", "--model", str(path), "--remove", "b", "--rows", rows, "--out", f"{tmp_path}/out"]) == 0
    # The set without a was tuned on b's proxies: it goes, too.
    assert [found.name for found in open_model(tmp_path / "out").card.row_sets] == [
        name for name in expected if name != "without-a"]


def test_export_with_a_choice_of_rows(path, merged, tmp_path):
    export = ["export", str(path), "--drop-bias"]
    assert main([*export, f"{tmp_path}/untuned", "--rows", "untuned"]) == 0
    assert main(["export", "--drop-bias", str(path), f"{tmp_path}/tuned_hf"]) == 0
    assert main(["export", "--drop-bias", str(path), f"{tmp_path}/less", "--exclude", "a"]) == 0
    key = "model.layers.0.mlp.gate.weight"
    row = merged.tensors[key].read()
    for name, factor, kept in (("untuned", 1, [0, 1, 2]), ("tuned_hf", 2, [0, 1, 2]), ("less", 3, [0, 2])):
        assert (open_model(tmp_path / name).tensors[key].read() == factor * row[kept]).all(), name


def test_inspect_says_which_guarantee_holds(path, tmp_path, capsys):
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rows["name"] for rows in found["row_sets"]] == ["tuned", "without-a", "untuned"]
    assert found["opt_out"] == {
        "a": {"in_model": True, "rows": "without-a", "guarantee": "strict", "strict": ["without-a", "untuned"],
              "expert_only": ["tuned"]},
        "b": {"in_model": True, "rows": "untuned", "guarantee": "strict", "strict": ["untuned"],
              "expert_only": ["tuned", "without-a"]},
    }
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "expert-only" in text and "without-a" in text and "on proxies of" in text
    assert main(["merge", "--model", str(path), "--remove", "b", "--rows", "tuned", "--out", f"{tmp_path}/kept"]) == 0
    capsys.readouterr()
    assert main(["inspect", f"{tmp_path}/kept", "--json"]) == 0
    gone = json.loads(capsys.readouterr().out)["opt_out"]["b"]
    assert gone["in_model"] is False and gone["guarantee"] == "expert-only"


def test_inspect_of_a_model_that_was_not_tuned(merged, tmp_path, capsys):
    save_model(merged, tmp_path / "merged", "megatron")
    assert main(["inspect", f"{tmp_path}/merged", "--json"]) == 0
    assert "opt_out" not in json.loads(capsys.readouterr().out)
