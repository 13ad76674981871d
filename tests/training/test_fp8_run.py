"""Runs in FP8 that cannot work are refused before anything is built or written."""

import pytest

from flexolmo_megatron.cli import main
from flexolmo_megatron.model.fp8 import Chip
from tests.training.runs import SMALL


def _refusal(tmp_path, capsys, *options):
    assert main(["train", "anchor", *SMALL, f"out={tmp_path}/run", f"data.train=[{tmp_path}/none]", *options]) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (["bf16=true", "fp8.recipe=tensorwise"],
     "fp8.recipe = tensorwise needs compute capability 8.9 or higher: this machine has no CUDA device"),
    (["fp8.recipe=tensorwise"], "fp8.recipe = tensorwise: expected bf16 = true with it"),
    (["bf16=true", "fp8.recipe=mxfp9"], "fp8.recipe = 'mxfp9': expected one of delayed, tensorwise, blockwise, mxfp8"),
    (["fp8.drop_frozen=true"], "fp8.drop_frozen = true: expected fp8.recipe with it"),
])
def test_refused_on_this_machine(tmp_path, capsys, options, message):
    assert message in _refusal(tmp_path, capsys, *options)


def test_sizes_are_checked_against_the_recipe(tmp_path, capsys, monkeypatch):
    chip = Chip("NVIDIA B200", (10, 0), "12.9", "2.11.0")
    monkeypatch.setattr("flexolmo_megatron.training.planning.this_chip", lambda: chip)
    error = _refusal(tmp_path, capsys, "bf16=true", "fp8.recipe=mxfp8")
    assert "fp8.recipe = mxfp8: model.ffn_hidden_size = 48 is not a multiple of 32" in error
