"""FP8 recipes: which chips, CUDA versions and sizes they accept, and how they refuse the others."""

from dataclasses import replace

import pytest

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.precision import FP8_RECIPES, Fp8Config
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.fp8 import RECIPES, Chip, check_recipe, check_sizes, fp8_settings

NONE = Chip("", (0, 0), "", None)
A100 = Chip("NVIDIA A100", (8, 0), "12.9", "2.11.0")
L40S = Chip("NVIDIA L40S", (8, 9), "12.9", "2.11.0")
H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), "12.9", "2.11.0")
B200 = Chip("NVIDIA B200", (10, 0), "12.9", "2.11.0")
RTX = Chip("NVIDIA GeForce RTX 5090", (12, 0), "12.9", "2.11.0")
SEVEN = ModelConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32,
                    num_query_groups=32, vocab_size=100352, max_position_embeddings=4096)


def test_the_configuration_names_the_recipes_that_exist():
    assert set(FP8_RECIPES) == set(RECIPES)


@pytest.mark.parametrize(("chip", "recipes"), [
    (NONE, set()), (A100, set()), (L40S, {"delayed", "tensorwise"}), (H100, {"delayed", "tensorwise", "blockwise"}),
    (B200, {"delayed", "tensorwise", "blockwise", "mxfp8"}), (RTX, {"delayed", "tensorwise", "blockwise"}),
    (replace(H100, cuda="12.8"), {"delayed", "tensorwise"}), (replace(H100, engine=None), set()),
])
def test_what_each_chip_runs(chip, recipes):
    accepted = set()
    for name in RECIPES:
        try:
            check_recipe(name, chip)
            accepted.add(name)
        except FlexOlmoError:
            pass
    assert accepted == recipes


@pytest.mark.parametrize(("recipe", "chip", "message"), [
    ("tensorwise", NONE, "recipe = tensorwise needs compute capability 8.9 or higher: this machine has no CUDA device"),
    ("tensorwise", A100, "needs compute capability 8.9 or higher: NVIDIA A100 has 8.0; use bf16"),
    ("mxfp8", H100, "fp8.recipe = mxfp8 needs compute capability 10.0 or higher and below 12.0: NVIDIA H100 80GB HBM3 "
                    "has 9.0; use delayed or tensorwise or blockwise, or bf16"),
    ("mxfp8", RTX, "below 12.0: NVIDIA GeForce RTX 5090 has 12.0"),
    ("blockwise", replace(H100, cuda="12.4"), "blockwise needs CUDA 12.9 or newer: torch was built for CUDA 12.4"),
    ("delayed", replace(H100, engine=None), "needs Transformer Engine, which is not installed; run: pip install"),
    ("delayed", replace(H100, engine="2.18.0"), "2.18.0 is installed"),
    ("current", H100, "fp8.recipe = 'current': expected one of delayed, tensorwise, blockwise, mxfp8"),
    ("tensor", H100, "(did you mean 'tensorwise'?)"),
])
def test_refusals(recipe, chip, message):
    with pytest.raises(FlexOlmoError) as error:
        check_recipe(recipe, chip)
    assert message in str(error.value)


def test_seven_billion_fits_every_recipe_up_to_eight_processes():
    for recipe in RECIPES:
        for tensor in (1, 2, 4, 8):
            if 11008 % (RECIPES[recipe].multiple * tensor) == 0:
                check_sizes(recipe, SEVEN, 4096, tensor)
    with pytest.raises(FlexOlmoError, match=r"model.ffn_hidden_size = 11008 / 16 processes is not a multiple of 32"):
        check_sizes("mxfp8", SEVEN, 4096, 16)
    check_sizes("mxfp8", SEVEN, 4096, 16, ffn_parallel=1)  # a mixture's experts are split over other processes
    with pytest.raises(FlexOlmoError, match=r"model.ffn_hidden_size = 11008 / 16 processes is not a multiple of 32"):
        check_sizes("mxfp8", SEVEN, 4096, 1, ffn_parallel=16)
    check_sizes("tensorwise", SEVEN, 128, token_parallel=8)
    with pytest.raises(FlexOlmoError, match=r"micro_batch_size \* data.seq_length = 128 / 16 processes is not a multi"):
        check_sizes("tensorwise", SEVEN, 128, token_parallel=16)


def test_sequence_parallelism_gathers_whole_blocks():
    for recipe, tokens in (("tensorwise", 16), ("blockwise", 128), ("mxfp8", 32)):
        check_sizes(recipe, SEVEN, 8 * tokens, 8, token_parallel=8, sequence_parallel=True)
    check_sizes("blockwise", SEVEN, 8 * 64, 8)
    with pytest.raises(FlexOlmoError, match="= 512 / 8 processes is not a multiple of 128, which parallel.sequence ne"):
        check_sizes("blockwise", SEVEN, 8 * 64, 8, token_parallel=8, sequence_parallel=True)


@pytest.mark.parametrize(("change", "tokens", "anchor", "message"), [
    ({"hidden_size": 4104, "num_attention_heads": 27, "num_query_groups": 27}, 4096, 0,
     "fp8.recipe = tensorwise: model.hidden_size = 4104 is not a multiple of 16"),
    ({}, 4090, 0, "micro_batch_size * data.seq_length = 4090 is not a multiple of 16"),
    ({}, 4096, 11000, "the anchor's ffn_hidden_size = 11000 is not a multiple of 16"),
])
def test_sizes_that_fp8_cannot_take(change, tokens, anchor, message):
    with pytest.raises(FlexOlmoError, match=message.replace("*", r"\*")):
        check_sizes("tensorwise", replace(SEVEN, **change), tokens, anchor_ffn=anchor)


def test_settings():
    assert fp8_settings(None) == {}
    assert fp8_settings("tensorwise") == {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    assert fp8_settings("mxfp8") == {"fp8": "e4m3", "fp8_recipe": "mxfp8"}


@pytest.mark.parametrize(("config", "bf16", "message"), [
    (Fp8Config("tensorwise"), False, "fp8.recipe = tensorwise: expected bf16 = true with it"),
    (Fp8Config("blockwize"), True, r"fp8.recipe = 'blockwize': expected one of .* \(did you mean 'blockwise'\?\)"),
    (Fp8Config(None, True), True, "fp8.drop_frozen = true: expected fp8.recipe with it"),
])
def test_configuration(config, bf16, message):
    with pytest.raises(FlexOlmoError, match=message):
        config.validate(bf16)
