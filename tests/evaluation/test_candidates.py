"""The syntax of --model and --domain."""

from pathlib import Path

import pytest

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.candidates import Candidate, parse_candidate, parse_domains

KNOWN = ["public", "code", "math", "law"]


@pytest.mark.parametrize(("text", "expected"), [
    ("merged=runs/merged", Candidate("merged", Path("runs/merged"))),
    ("no math=runs/merged@-math", Candidate("no math", Path("runs/merged"), without=("math",))),
    ("two =runs/merged@public, code", Candidate("two", Path("runs/merged"), only=("public", "code"))),
    ("x=runs/merged@-math,-law", Candidate("x", Path("runs/merged"), without=("math", "law"))),
    ("x=/home/me@lab/merged", Candidate("x", Path("/home/me@lab/merged"))),
    ("x=/home/me@lab/merged@code", Candidate("x", Path("/home/me@lab/merged"), only=("code",))),
    ("x=runs/lr=3", Candidate("x", Path("runs/lr=3"))),
])
def test_models(text: str, expected: Candidate) -> None:
    assert parse_candidate(text) == expected


def test_an_existing_path_is_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "merged@v2").mkdir()
    assert parse_candidate(f"x={tmp_path}/merged@v2") == Candidate("x", tmp_path / "merged@v2")


@pytest.mark.parametrize("text", ["runs/merged", "=runs/merged", "merged=", " =x", "x=@code", "x=runs/merged@",
                                  "x=runs/merged@code,", "x=runs/merged@-"])
def test_models_of_another_form(text: str) -> None:
    with pytest.raises(FlexOlmoError) as error:
        parse_candidate(text)
    assert str(error.value).startswith(f"--model {text!r}: expected NAME=PATH, NAME=PATH@EXPERT,...")


def test_using_and_leaving_out_at_once() -> None:
    with pytest.raises(FlexOlmoError, match="both names experts to use and experts to leave out: expected NAME=PATH"):
        parse_candidate("x=runs/merged@code,-math")


def test_which_experts_are_used() -> None:
    path = Path("merged")
    assert Candidate("x", path).experts(KNOWN) is None
    assert Candidate("x", path).experts([]) is None
    assert Candidate("x", path, only=("law", "public")).experts(KNOWN) == ["public", "law"]
    assert Candidate("x", path, only=("law",)).experts(KNOWN) == ["public", "law"]
    assert Candidate("x", path, without=("math",)).experts(KNOWN) == ["public", "code", "law"]


@pytest.mark.parametrize("candidate", [Candidate("x", Path("m"), only=("maths",)),
                                       Candidate("x", Path("m"), without=("maths",))])
def test_unknown_experts(candidate: Candidate) -> None:
    with pytest.raises(FlexOlmoError) as error:
        candidate.experts(KNOWN)
    assert str(error.value) == ("--model x: m: unknown expert 'maths' (did you mean 'math'?): expected one of "
                                "public, code, math, law")


def test_the_anchor_stays() -> None:
    with pytest.raises(FlexOlmoError, match="--model x: m: expert 'public' cannot be left out"):
        Candidate("x", Path("m"), without=("public",)).experts(KNOWN)


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(FlexOlmoError, match="--model x: m is a dense model, which has no experts to choose from"):
        Candidate("x", Path("m"), only=("code",)).experts([])


def test_domains() -> None:
    assert parse_domains(["code=a/*.jsonl", "math=m.parquet", "code=b=c.jsonl"]) == {
        "code": ["a/*.jsonl", "b=c.jsonl"], "math": ["m.parquet"]}
    for text in ("a.jsonl", "=a.jsonl", "code="):
        with pytest.raises(FlexOlmoError) as error:
            parse_domains([text])
        assert str(error.value).startswith(f"--domain {text!r}: expected NAME=FILES")
