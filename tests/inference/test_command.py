"""``flexolmo generate`` as a user calls it."""

import argparse
import io
import json
import re
import sys

import pytest

from flexolmo_megatron.commands import generate
from flexolmo_megatron.errors import FlexOlmoError


def call(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    generate.register(parser.add_subparsers())
    args = parser.parse_args(["generate", *map(str, arguments)])
    args.run(args)


def test_readable_answers(merged_path, model, capsys):
    call(merged_path, "--prompt", "hello", "--prompt", "abc", "--max-new-tokens", 7)
    out = capsys.readouterr().out
    for answer in model.generate(["hello", "abc"], max_new_tokens=7):
        assert answer.prompt + answer.text in out
        assert f"{len(answer.tokens)} tokens, " in out
    assert re.search(r"\[routing weight: public \d+\.\d%, code \d+\.\d%, math \d+\.\d%, law \d+\.\d%; 7 tokens, "
                     r"stopped at --max-new-tokens\]", out)


def test_json_lines(merged_path, model, capsys):
    call(merged_path, "--prompt", "hello", "--json", "--max-new-tokens", 5, "--temperature", 0.7, "--top-k", 9,
         "--top-p", 0.8, "--seed", 4, "--exclude", "law,math")
    (line,) = capsys.readouterr().out.splitlines()
    (answer,) = model.generate("hello", experts=["public", "code"], max_new_tokens=5, temperature=0.7, top_k=9,
                               top_p=0.8, seed=4)
    found = json.loads(line)
    assert found["prompt"] == "hello" and found["text"] == answer.text and found["tokens"] == answer.tokens
    assert found["finish"] == answer.finish and found["experts"] == ["public", "code"]
    assert found["routing_share"] == pytest.approx(answer.routing_share, abs=1e-5)


def test_public_is_always_used(merged_path, capsys):
    call(merged_path, "--prompt", "a", "--experts", "math", "--json", "--max-new-tokens", 2)
    assert json.loads(capsys.readouterr().out)["experts"] == ["public", "math"]


def test_prompts_from_a_file(merged_path, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\n\nthree\n", encoding="utf-8")
    call(merged_path, "--prompts-file", tmp_path / "prompts.txt", "--json", "--max-new-tokens", 1)
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["one", "", "three"]


def test_prompts_from_json_lines(merged_path, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\\nb"}\n"c"\n', encoding="utf-8")
    call(merged_path, "--prompts-file", tmp_path / "prompts.jsonl", "--json", "--max-new-tokens", 1)
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["a\nb", "c"]


def test_prompts_from_standard_input(merged_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    call(merged_path, "--json", "--max-new-tokens", 1)
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]


def test_standard_input_must_be_text(merged_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n"), encoding="utf-8"))
    with pytest.raises(FlexOlmoError, match="standard input cannot be read as text: .* can't decode byte 0xff"):
        call(merged_path)


def test_a_dense_model(dense_path, capsys):
    call(dense_path, "--prompt", "a", "--max-new-tokens", 3)
    assert "routing weight" not in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--experts", "cod"], "--experts cod: unknown expert 'cod' (did you mean 'code'?): expected one of public, code"),
    (["--exclude", "public"], "--exclude public: 'public' cannot be excluded, it is the anchor"),
    (["--exclude", "code,xyz"], "--exclude code,xyz: unknown expert 'xyz'"),
    (["--top-p", "2"], "top_p = 2.0: expected a probability above 0, at most 1"),
])
def test_wrong_arguments_are_one_sentence(merged_path, arguments, message):
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        call(merged_path, "--prompt", "a", *arguments)


def test_a_dense_model_has_no_experts_to_choose(dense_path):
    with pytest.raises(FlexOlmoError, match="--exclude code: this is a dense model, which has no experts"):
        call(dense_path, "--prompt", "a", "--exclude", "code")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("empty.txt", b"", "empty.txt holds no prompt: expected at least one line"),
    ("bad.txt", b"\xff\xfe", "bad.txt cannot be read as UTF-8 text"),
    ("bad.jsonl", b'"a"\n{"prompt"\n', "bad.jsonl, line 2 is not JSON"),
    ("number.jsonl", b"3\n", "number.jsonl, line 1: expected a JSON string, or an object with a text as \"prompt\""),
    ("none.jsonl", b'{"text": "a"}\n', "none.jsonl, line 1: expected a JSON string"),
])
def test_unreadable_prompts_are_one_sentence(merged_path, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        call(merged_path, "--prompts-file", tmp_path / name)


def test_a_missing_file_is_one_sentence(merged_path, tmp_path):
    with pytest.raises(FlexOlmoError, match="nothing.txt does not exist: expected a text file"):
        call(merged_path, "--prompts-file", tmp_path / "nothing.txt")
