"""Which methods there are for which models, what they are called, and how many training tokens each took."""

from pathlib import Path

import pytest

from flexolmo_megatron.config.card import RowSet
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import save_model
from flexolmo_megatron.convert.rows import is_row
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods import FAMILIES, RUNS, Method, Models, Settings, Variant, build_methods
from tests.random_models import random_model

TOKENS = {"public": 1000, "owner": 100, "router": 10, "btx": 20, "unrestricted-1x": 150, "unrestricted-2x": 300}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    save_model(random_model("moe", 3, 2), tmp_path / "merged", "megatron")
    return tmp_path / "merged"


def tuned(path: Path, *more: RowSet) -> Path:
    """The same model, with tuned rows, untuned ones, and others."""
    model = random_model("moe", 3, 2)
    rows = {name: tensor for name, tensor in model.tensors.items() if is_row(name)}
    model.card.row_sets = [RowSet("tuned", ["code", "math"], ["code", "math"]), *more, RowSet("untuned")]
    save_model(LazyModel(model.card, model.tensors, {row_set.name: rows for row_set in model.card.row_sets[1:]}), path,
               "megatron")
    return path


def by_name(methods: list[Method]) -> dict[str, Method]:
    assert len({method.name for method in methods}) == len(methods)
    return {method.name: method for method in methods}


def test_all_of_them(merged: Path, tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("public", "soup", "btx", "1x", "2x", "math", "code")}
    models = Models(paths["public"], {name: paths[name] for name in ("math", "code")}, paths["soup"], paths["btx"],
                    merged, tuned(tmp_path / "tuned"), {name: paths[name] for name in ("1x", "2x")},
                    {"no bias": merged, "my own": merged})
    texts = {"public": ["a"], "math": ["b"], "code": ["c"]}
    methods = by_name(build_methods(models, Settings(classifier_texts=texts)))
    assert list(methods) == [
        "public", "dense math", "dense code", "soup", "soup weighted oracle",
        "BTM top-2 oracle", "BTM top-2 oracle probabilities", "BTM top-2 causal", "BTM top-2 causal probabilities",
        "BTM top-3 oracle", "BTM top-3 oracle probabilities", "BTM top-3 causal", "BTM top-3 causal probabilities",
        "prompt routing oracle", "prompt routing causal", "block routing causal", "BTX",
        "unrestricted MoE 1x", "unrestricted MoE 2x",
        "FlexOlmo", "FlexOlmo top-1", "FlexOlmo top-2", "FlexOlmo top-3",
        "FlexOlmo without code", "FlexOlmo without math",
        "FlexOlmo tuned", "FlexOlmo tuned top-1", "FlexOlmo tuned top-2", "FlexOlmo tuned top-3",
        "FlexOlmo tuned without code (strict)", "FlexOlmo tuned without code (expert-only)",
        "FlexOlmo tuned without math (strict)", "FlexOlmo tuned without math (expert-only)",
        "FlexOlmo, no bias", "FlexOlmo, my own"]
    assert [method.family for method in methods.values()] == sorted(
        (method.family for method in methods.values()), key=list(FAMILIES).index)
    tokens = {name: method.training_tokens(TOKENS) for name, method in methods.items()}
    assert tokens["public"] == 1000
    assert tokens["dense math"] == 1100
    assert {tokens[name] for name in ("soup", "BTM top-2 causal", "prompt routing causal", "FlexOlmo", "FlexOlmo top-3",
                                      "FlexOlmo, no bias")} == {1200}
    assert (tokens["BTX"], tokens["unrestricted MoE 1x"], tokens["unrestricted MoE 2x"]) == (1220, 1150, 1300)
    assert (tokens["FlexOlmo tuned"], tokens["FlexOlmo without code"]) == (1210, 1100)
    assert tokens["FlexOlmo tuned without math (strict)"] == 1100, "these rows were never tuned"
    assert tokens["FlexOlmo tuned without math (expert-only)"] == 1210
    assert methods["FlexOlmo tuned"].training == "public + 2 owner + router"
    assert {kind for method in methods.values() for kind in method.runs} == set(RUNS)
    assert all(method.definition and method.source and "\n" not in method.definition for method in methods.values())
    assert methods["FlexOlmo, no bias"].definition == "router rows start at domain vectors and train, without a bias"
    assert methods["FlexOlmo, my own"].definition == "my own"


def test_forms_of_one_model_share_their_numbers(merged: Path, tmp_path: Path) -> None:
    methods = by_name(build_methods(Models(tmp_path, merged=merged), families=["flexolmo"]))
    assert methods["FlexOlmo"].variants == methods["FlexOlmo top-2"].variants == (Variant(merged, top_k=2),)
    assert methods["FlexOlmo top-3"].variants == (Variant(merged, top_k=3),)
    assert methods["FlexOlmo without math"].variants == (Variant(merged, ("math",), 2),)


def test_opting_out_of_rows_that_were_tuned_without_the_owner(tmp_path: Path) -> None:
    path = tuned(tmp_path / "tuned", RowSet("without-math", ["code"], ["code"]))
    methods = by_name(build_methods(Models(tmp_path, tuned=path), families=["flexolmo"]))
    strict = methods["FlexOlmo tuned without math (strict)"]
    assert strict.definition == "without math, with router rows that nothing of math has shaped: without-math"
    assert strict.training == "public + owner + router"
    assert methods["FlexOlmo tuned without code (strict)"].training == "public + owner"
    expert_only = methods["FlexOlmo tuned without math (expert-only)"]
    assert expert_only.variants == (Variant(path, ("math",), 2, "tuned"),)
    assert expert_only.training == "public + 2 owner + router"


def test_only_what_there_are_models_for(tmp_path: Path) -> None:
    assert [method.name for method in build_methods(Models(tmp_path))] == ["public"]
    assert [method.name for method in build_methods(Models(tmp_path, {"math": tmp_path}), families=["dense"])] == [
        "dense math"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FlexOlmoError, match="unknown family of methods 'flexolm'.*did you mean 'flexolmo'.*: expected "
                                            "some of public, dense, soup, btm"):
        build_methods(Models(tmp_path), families=["flexolm"])
    save_model(random_model("dense"), tmp_path / "dense", "megatron")
    for models in (Models(tmp_path, merged=tmp_path / "dense"), Models(tmp_path, ablations={"x": tmp_path / "dense"})):
        with pytest.raises(FlexOlmoError, match=r"dense is no merged model.* \(kind dense, 0 experts\): expected one"):
            build_methods(models)
    method, = build_methods(Models(tmp_path))
    with pytest.raises(FlexOlmoError, match="method 'public' needs a public run, whose number of tokens is not given"):
        method.training_tokens({"owner": 1})


@pytest.mark.parametrize(("values", "message"), [
    ({"btm_temperatures": [1, 0]}, "btm_temperatures = 0: expected a number above 0"),
    ({"soup_temperature": float("inf")}, "soup_temperature = inf: expected a number above 0"),
    ({"btm_top_k": [0]}, "btm_top_k = 0: expected at least 1"),
    ({"prompt_bytes": 0}, "prompt_bytes = 0: expected at least 1"),
])
def test_impossible_settings(values: dict, message: str) -> None:
    with pytest.raises(FlexOlmoError, match=message):
        Settings(**values)
