"""The verbs as a user runs them, through the parser and with exit statuses."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

from flexolmo_megatron.commands.exchange import register
from flexolmo_megatron.config.card import TUNED_MODEL
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.domain.vector import DomainVector, save_vector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.exchange.merge import merge
from flexolmo_megatron.exchange.verify import verify


def flexolmo(*words) -> None:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    args.run(args)


@pytest.fixture
def work(tmp_path, anchor, new_pair, digest):
    """A folder with the anchor, and the checkpoints of two owners."""
    save_model(anchor, tmp_path / "anchor", format="hf")
    save_model(new_pair(1, digest, bias=True), tmp_path / "math_run", format="megatron")
    save_model(new_pair(2, digest), tmp_path / "code_run", format="megatron")
    return tmp_path


def test_from_checkpoints_to_a_merged_model_and_back(work, anchor, digest, capsys):
    flexolmo("pack", work / "math_run", work / "math", "--name", "math", "--owner", "[red]me", "--licence", "MIT")
    flexolmo("pack", work / "code_run", work / "code", "--anchor", work / "anchor")
    assert f"for anchor {digest}" in capsys.readouterr().out

    flexolmo("verify", work / "math", "--anchor", work / "anchor")
    shown = capsys.readouterr().out
    assert "intact, all numbers finite" in shown and "[red]me" in shown and "MIT" in shown
    assert digest in shown  # in one piece
    assert shown.endswith(f"accepted: {work / 'math'} may be merged into {work / 'anchor'}\n")

    flexolmo("merge", "--anchor", work / "anchor", work / "math", work / "code", "--out", work / "merged")
    assert "3 experts (public, math, mine), top-k 3" in capsys.readouterr().out
    merged = open_model(work / "merged")
    packages = [verify(work / name, anchor) for name in ("math", "code")]
    assert model_digest(merged) == model_digest(merge(anchor, packages))

    flexolmo("merge", "--model", work / "merged", "--remove", "math", "--out", work / "without", "--format", "hf",
             "--top-k", 1)
    without = open_model(work / "without")
    assert without.card.expert_names == ["public", "mine"] and without.card.model.top_k == 1
    assert model_digest(without) == model_digest(merge(anchor, packages[1:]))

    flexolmo("merge", "--model", work / "merged", "--remove", "math", "--add", work / "math", "--out", work / "again")
    assert open_model(work / "again").card.expert_names == ["public", "mine", "math"]

    capsys.readouterr()
    flexolmo("merge", "--model", work / "merged", "--remove", "math", "mine", "--out", work / "alone")
    assert f"{work / 'alone'}: 1 expert (public), top-k 1, " in capsys.readouterr().out


def test_inspect(work, make_package, digest, capsys):
    flexolmo("inspect", work / "anchor", "--digest", "--json")
    described = json.loads(capsys.readouterr().out)
    assert described["digest"] == digest
    assert (described["kind"], described["format"], described["dtypes"].keys()) == ("moe", "hf", {"BF16"})
    assert described["experts"][0]["name"] == "public"

    flexolmo("merge", "--anchor", work / "anchor", make_package("math"), make_package("code", 2),
             "--out", work / "merged", "--top-k", 1)
    capsys.readouterr()
    flexolmo("inspect", work / "merged", "--json")
    merged = json.loads(capsys.readouterr().out)
    one_expert = 2 * 3 * 8 * 12
    assert merged["parameters"] == described["parameters"] + 2 * (one_expert + 2 * 8)
    assert merged["active_parameters"] == merged["parameters"] - 2 * one_expert
    assert merged["bytes"] == 2 * merged["parameters"]
    assert [expert["owner"] for expert in merged["experts"]] == ["", "An owner", "An owner"]
    assert merged["anchor_digest"] == digest and "digest" not in merged
    assert merged["chosen_top_k"] == 1 and described["chosen_top_k"] is None

    flexolmo("inspect", work / "merged")
    shown = capsys.readouterr().out
    for text in ("megatron", "math", "An owner", "top k", "num layers", f"{merged['parameters']:,}"):
        assert text in shown


def test_inspect_a_training_run(work, anchor, capsys):
    steps = work / "run" / "checkpoints"
    save_model(anchor, steps / "step_00000100", format="megatron")
    save_model(anchor, steps / "step_00000200", format="megatron")
    (steps / "step_00000300").mkdir()  # cut off
    (work / "run" / TUNED_MODEL).mkdir()  # and so was writing the tuned model
    flexolmo("inspect", work / "run", "--json")
    described = json.loads(capsys.readouterr().out)
    assert described["described_checkpoint"] == "step_00000200"
    assert described["checkpoints"] == ["step_00000100", "step_00000200"]


def test_inspect_a_launch_through_megatron_lm(work, anchor, capsys):
    for iteration in ("iter_0000010", "iter_0000009"):
        save_model(anchor, work / "launch" / iteration, format="megatron")
    flexolmo("inspect", work / "launch", "--json")
    described = json.loads(capsys.readouterr().out)
    assert described["checkpoints"] == ["iter_0000009", "iter_0000010"]
    assert described["described_checkpoint"] == "iter_0000010"


def test_inspect_a_run_that_has_tuned_a_router(work, anchor, capsys):
    save_model(anchor, work / "run" / TUNED_MODEL, format="megatron")
    flexolmo("inspect", work / "run", "--json")
    described = json.loads(capsys.readouterr().out)
    assert described["described_checkpoint"] == TUNED_MODEL and "checkpoints" not in described


def test_inspect_a_package(make_package, capsys):
    package = make_package("math", bias=True)
    flexolmo("inspect", package, "--json")
    described = json.loads(capsys.readouterr().out)
    assert (described["kind"], described["contents"], described["router_bias"]) == ("package", "not read", True)
    assert described["manifest"]["name"] == "math" and described["parameters"] == 2 * (3 * 8 * 12 + 8 + 1)
    flexolmo("inspect", package, "--digest")
    assert "match sha256" in capsys.readouterr().out
    with open(package / "expert.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(FlexOlmoError, match="is damaged or was changed"):
        flexolmo("inspect", package, "--digest")


@pytest.mark.parametrize(("words", "message"), [
    (["merge", "--anchor", "anchor", "--out", "o"], "nothing to merge: name at least one package"),
    (["merge", "--anchor", "anchor", "--remove", "math", "--out", "o"], "--remove math needs --model"),
    (["merge", "--anchor", "nowhere", "p", "--out", "o"], "nowhere does not exist"),
    (["merge", "--anchor", "anchor", "nowhere", "--out", "o"], "nowhere does not exist; expected an expert package"),
    (["merge", "--anchor", "math_run", "package_a", "--out", "o"], "a model of kind 'pair' is no anchor"),
    (["merge", "--anchor", "anchor", "package_a", "package_a", "--out", "o"], "expert name 'a' appears twice"),
    (["merge", "--anchor", "anchor", "package_a", "--top-k", "3", "--out", "o"], "model.top_k = 3: expected 1 to"),
    (["merge", "--model", "anchor", "--remove", "b", "--out", "o"], "unknown expert 'b'"),
    (["merge", "--anchor", "anchor", "package_a", "--out", "package_a"], "package_a already exists"),
    (["verify", "anchor", "--anchor", "anchor"], "unexpected entry|holds"),
    (["verify", "package_a", "--anchor", "math_run"], "a model of kind 'pair' is no anchor"),
    (["verify", "package_a", "--anchor", "merged_a"], "expert name 'a' appears twice"),
    (["pack", "anchor", "o"], "a checkpoint of kind 'moe' cannot be packed"),
    (["pack", "math_run", "o", "--name", "a/b"], "expert name 'a/b': expected"),
    (["pack", "math_run", "package_a"], "package_a already exists"),
    (["inspect", "nowhere"], "nowhere does not exist"),
    (["inspect", "."], "holds no model"),
])
def test_bad_input(work, make_package, monkeypatch, words, message):
    make_package("a")
    monkeypatch.chdir(work)
    if "merged_a" in words:
        flexolmo("merge", "--anchor", "anchor", "package_a", "--out", "merged_a")
    before = sorted(path.name for path in work.iterdir())
    with pytest.raises(FlexOlmoError, match=message):
        flexolmo(*words)
    assert sorted(path.name for path in work.iterdir()) == before


@pytest.fixture
def dense_copy(work, anchor, digest):
    """An owner's dense copy (expert.coordination=false), and ``save(dense_digest)``, which writes its domain vector."""
    dense = as_dense(anchor)
    save_model(replace(dense, card=replace(dense.card, anchor_digest=digest, anchor_dtype="bfloat16")),
               work / "dense_run", format="megatron")
    rows = np.eye(8, dtype=np.float32)[:2]

    def save(dense_digest: str):
        vector = DomainVector(rows, "anchor", "ab" * 32, dense_digest, documents=3, dropped=0, seed=0, norm=1.0)
        save_vector(vector, work / "vector.npz")
        return ["pack", work / "dense_run", work / "own", "--domain-vector", work / "vector.npz"]

    return save


def test_a_dense_copy_is_packed_with_a_vector_of_its_anchor(work, dense_copy, anchor, digest):
    flexolmo(*dense_copy(model_digest(as_dense(anchor))), "--name", "own", "--anchor", work / "anchor")
    package = verify(work / "own", anchor)
    assert package.manifest.name == "own" and package.manifest.router["documents"] == 3
    assert package.tensors["layers.1.router"].read().tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("options", "message"), [
    (["--name", "own"], "--domain-vector needs --anchor"), (["--anchor", "anchor"], "--domain-vector needs --name"),
    (["--name", "a/b", "--anchor", "anchor"], "expert name 'a/b': expected"),
    (["--name", "own", "--anchor", "anchor"],
     r"vector.npz was made for another anchor \(digest 0c0c0c0c0c0c…\): expected one for anchor \(digest "),
])
def test_a_vector_of_another_anchor_is_refused(work, dense_copy, monkeypatch, options, message):
    monkeypatch.chdir(work)
    with pytest.raises(FlexOlmoError, match=message):
        flexolmo(*dense_copy("0c" * 32), *options)
    assert not (work / "own").exists()


def test_a_dense_copy_of_another_anchor_is_refused(work, dense_copy, new_anchor):
    other = new_anchor(seed=5)
    save_model(other, work / "other", format="hf")
    with pytest.raises(FlexOlmoError, match="the checkpoint was trained against anchor [0-9a-f]{64}, not against"):
        flexolmo(*dense_copy(model_digest(as_dense(other))), "--name", "own", "--anchor", work / "other")
