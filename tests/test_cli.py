"""The command line as a whole: every verb explains itself, errors are one sentence, and imports stay light."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexolmo_megatron import cli

VERBS = (
    "data",
    "train",
    "embed",
    "import",
    "export",
    "pack",
    "verify",
    "merge",
    "inspect",
    "generate",
    "eval",
    "plot",
    "bench",
    "launch",
)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "flexolmo_megatron.cli", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"usage: flexolmo {verb}" in capsys.readouterr().out


def test_all_verbs_are_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {verb} " in text for verb in VERBS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["merge", "--anchor", "/nowhere", "package", "--out", "/tmp/x"], "/nowhere does not exist"),
        (["inspect", "/nowhere"], "/nowhere does not exist"),
        (["generate", "/nowhere", "--prompt", "x"], "/nowhere does not exist"),
        (["import", "/nowhere", "/tmp/x"], "/nowhere"),
        (["data", "/nowhere.jsonl", "--out", "/tmp/x"], "/nowhere.jsonl"),
        (["train", "expert", "--config", "/nowhere.yaml"], "/nowhere.yaml does not exist"),
    ],
)
def test_missing_files_are_one_sentence(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("flexolmo: ") and "\n" not in error
    assert message in error


def test_exit_status_of_the_process():
    result = run("inspect", "/nowhere")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and result.stdout == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_sentence():
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-m", "flexolmo_megatron.cli", "mix"], stdout=full,
                                stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == "flexolmo: cannot write the output: No space left on device\n"


def test_a_closed_folder_is_one_sentence(monkeypatch, capsys):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)  # root may look everywhere
    assert cli.main(["plot", "closed/run"]) == 2
    assert capsys.readouterr().err == (
        "flexolmo: closed/run: permission denied; expected something that this user may use\n"
    )


def test_a_name_that_no_file_system_takes_is_one_sentence(capsys):
    assert cli.main(["inspect", "x" * 300]) == 2
    assert capsys.readouterr().err == f"flexolmo: {'x' * 300}/manifest.json: expected a shorter name\n"


def test_unknown_words_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", "a", "b"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "anchor", "--presett", "tiny"])
    assert stopped.value.code == 2


def test_importing_the_package_and_asking_for_help_imports_nothing_heavy():
    program = (
        "import sys, flexolmo_megatron, flexolmo_megatron.cli as cli\n"
        "cli.build_parser()\n"
        "print([name for name in ('torch', 'megatron', 'transformers', 'nemo', 'transformer_engine', 'matplotlib') "
        "if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
