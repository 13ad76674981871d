import argparse
import subprocess
import sys

import pytest

from flexolmo_megatron.commands import convert
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.errors import FlexOlmoError

from .conftest import assert_same_tensors, lazy_model


def command(*words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    convert.register(parser.add_subparsers(dest="verb", required=True))
    args = parser.parse_args([str(word) for word in words])
    args.run(args)


def test_import_and_export(tmp_path, flex_olmo, capsys):
    command("import", flex_olmo, tmp_path / "megatron")
    command("export", tmp_path / "megatron", tmp_path / "hf", "--max-shard-size", "20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    assert_same_tensors(open_model(tmp_path / "hf"), open_model(flex_olmo))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'megatron'}: 2 layers, 3 experts (public, expert_1, expert_2), 0.000 GB")


@pytest.mark.parametrize("option", [("--experts", "expert_2"), ("--experts", "expert_2, public"),
                                    ("--exclude", "expert_1")])
def test_export_of_some_experts(tmp_path, flex_olmo, option):
    command("export", flex_olmo, tmp_path / "hf", *option)
    assert open_model(tmp_path / "hf").card.expert_names == ["public", "expert_2"]


def test_export_asks_before_it_drops_a_bias(tmp_path, capsys):
    save_model(lazy_model("moe", router_bias=True), tmp_path / "megatron", "megatron")
    with pytest.raises(FlexOlmoError, match="learned router bias"):
        command("export", tmp_path / "megatron", tmp_path / "hf")
    command("export", tmp_path / "megatron", tmp_path / "hf", "--drop-bias")
    assert "learned router bias left out: dropping it raises the routing logit of" in capsys.readouterr().err
    with pytest.raises(FlexOlmoError, match="hf already exists"):
        command("export", tmp_path / "megatron", tmp_path / "hf", "--drop-bias")
    assert capsys.readouterr().err == ""


def test_only_a_hugging_face_directory_is_imported(tmp_path):
    save_model(lazy_model("dense"), tmp_path / "megatron", "megatron")
    with pytest.raises(FlexOlmoError, match="config.json does not exist; expected the config.json of a Hugging Face"):
        command("import", tmp_path / "megatron", tmp_path / "out")


@pytest.mark.parametrize("size", ["5TB", "0", "-1GB", "inf", "x"])
def test_bad_shard_size(size):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{size}': expected a size such as 5GB, 500MB or a number"):
        convert._bytes(size)


def test_shard_sizes():
    assert [convert._bytes(text) for text in ("12", "3kb", "1.5 MB", "5GB")] == [12, 3000, 1_500_000, 5_000_000_000]


def test_options_exclude_each_other_and_help_needs_no_torch(tmp_path):
    code = ("import argparse, sys; from flexolmo_megatron.commands.convert import register; "
            "parser = argparse.ArgumentParser(); register(parser.add_subparsers()); "
            "assert 'torch' not in sys.modules; parser.parse_args(sys.argv[1:])")
    result = subprocess.run([sys.executable, "-c", code, "export", "a", "b", "--experts", "x", "--exclude", "y"],
                            capture_output=True, text=True)
    assert result.returncode == 2 and "not allowed with argument --experts" in result.stderr


def test_conversion_imports_no_megatron():
    code = ("import sys; import flexolmo_megatron.convert.model, flexolmo_megatron.convert.progress; "
            "print([name for name in sys.modules if name.startswith(('megatron', 'transformers'))])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
