"""``flexolmo bench gpu``: its comparisons against a stand-in for Transformer Engine, its sums, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.fp8 import Chip
from tests.distributed import run_distributed

ENGINE = str(Path(__file__).parent.parent / "model" / "engine")
H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), "12.9", "2.11.0")


def _comparisons():
    """Every check: as it should be, with scales of 1 (delayed scaling in the stand-in), and with exclusion left out."""
    sys.path.insert(0, ENGINE)
    from contextlib import nullcontext

    from flexolmo_megatron.runtime.setup import initialize, prepare

    prepare()
    initialize()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    from flexolmo_megatron.training import bench_parity
    from flexolmo_megatron.training.bench_gpu import TINY, compare

    torch.manual_seed(0)
    sound, unscaled = (list(compare(TINY, TESpecProvider(), recipe)) for recipe in ("tensorwise", "delayed"))
    bench_parity.only_allowed = lambda model, allowed: nullcontext()
    return sound, unscaled, list(compare(TINY, TESpecProvider(), None))


@pytest.fixture(scope="module")
def comparisons():
    return run_distributed(_comparisons, 1, timeout=400)[0]


def test_sound_modules_pass_and_are_really_rounded(comparisons):
    sound = {check.what: check for check in comparisons[0]}
    assert len(sound) == 3 * 3 * 3 + 1 + 3
    assert [check for check in sound.values() if not check.passed] == []
    fp8 = "Transformer Engine, FP8 tensorwise"
    for part in ("pair, output", "pair, gradients", "merged layer, output", "merged layer, gradients"):
        bf16 = sound[f"{part}: Transformer Engine, bf16"].error
        assert 1e-3 < bf16 < 0.02 < sound[f"{part}: {fp8}"].error
    assert sound[f"pair, output: {fp8}, frozen weights in FP8 only"].tolerance == 0
    assert "products in series" in sound[f"pair, output: {fp8}"].reason


def test_bad_scales_are_caught(comparisons):
    failed = {check.what for check in comparisons[1] if not check.passed}
    fp8 = "Transformer Engine, FP8 delayed"
    assert {f"pair, output: {fp8}", f"pair, gradients: {fp8}", f"merged layer, output: {fp8}"} <= failed
    assert all(fp8 in what for what in failed)


def test_an_expert_that_is_not_excluded_is_caught(comparisons):
    failed = {check.what for check in comparisons[2] if not check.passed}
    assert failed == {f"merged layer, excluded experts hold NaN: {name}"
                      for name in ("local, bf16", "Transformer Engine, bf16")}


@pytest.fixture(scope="module")
def result():
    from flexolmo_megatron.training.bench_gpu import bench_gpu, choose

    return bench_gpu(*choose("cpu", None), rounds=1)


def test_on_the_cpu_nothing_is_said_about_a_gpu(result, capsys):
    from rich.console import Console

    from flexolmo_megatron.training.bench_report import render

    found = json.loads(json.dumps(result.as_json()))
    assert found["device"] == "cpu" and found["fp8_recipe"] is None and found["passed"] is True
    assert [speed["what"] for speed in found["pair"]] == ["ours, fp32", "stock, fp32"]
    assert all(target["measured"] is None and target["met"] is None for target in found["targets"])
    assert all(row["share_of_bf16_peak"] is None for name in ("pair", "layer", "grouped") for row in found[name])
    # 2 layers: 14 products forward, the head's 2, 7 inputs, 6 weights, 1 between the first expert's matrices.
    assert found["products"] == {"launched": 31, "needed": 30, "extra": 1, "frozen": 9, "passed": True}
    Console(width=120).print(render(result))
    printed = capsys.readouterr().out
    assert "these speeds say nothing about" in printed and printed.count("not measured") == 5


def test_what_was_measured_adds_up(result):
    pair = result.pair[0]
    assert pair.tokens == 2 * 32 and pair.peak_bytes is None
    assert pair.tokens_per_second * pair.seconds == pytest.approx(64)
    assert pair.tflops == pytest.approx(pair.flops / pair.seconds / 1e12)
    rows = {speed.what: speed for speed in result.grouped}
    assert set(rows) == {"one matrix, fp32", "8 experts, even, fp32", "8 experts, half to one, fp32"}
    assert {speed.flops for speed in rows.values()} == {2 * (64 * 4) * 64 * 2 * 96}


def test_the_command_prints_json(capsys, result, monkeypatch):
    monkeypatch.setattr("flexolmo_megatron.training.bench_gpu.bench_gpu", lambda *args, **options: result)
    assert main(["bench", "gpu", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 2


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "`flexolmo bench gpu` needs an NVIDIA GPU, and this machine has no CUDA device: with --device cpu"),
    (["--device", "cpu", "--recipe", "tensorwise"], "--recipe tensorwise with --device cpu: FP8 needs a GPU"),
    (["--device", "cpu", "--rounds", "0"], "--rounds 0: expected 1 or more"),
])
def test_refusals(arguments, message, capsys):
    assert main(["bench", "gpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("chip", "recipe"), [
    (H100, "tensorwise"), (Chip("NVIDIA B200", (10, 0), "12.9", "2.11.0"), "mxfp8"),
    (Chip("NVIDIA A100", (8, 0), "12.9", "2.11.0"), None),
])
def test_the_recipe_that_is_measured(chip, recipe, monkeypatch):
    from flexolmo_megatron.training import bench_gpu

    monkeypatch.setattr(bench_gpu, "this_chip", lambda: chip)
    assert bench_gpu.choose("cuda", None) == (chip, recipe)
    with pytest.raises(FlexOlmoError, match="--device cpu is for machines without a GPU"):
        bench_gpu.choose("cpu", None)
    if recipe != "mxfp8":
        with pytest.raises(FlexOlmoError, match="fp8.recipe = mxfp8 needs compute capability 10.0"):
            bench_gpu.choose("cuda", "mxfp8")


def test_a_gpu_without_the_engine_is_refused(monkeypatch):
    from flexolmo_megatron.training import bench_gpu

    monkeypatch.setattr(bench_gpu, "this_chip", lambda: Chip("NVIDIA H100", (9, 0), "12.9", None))
    with pytest.raises(FlexOlmoError, match="`flexolmo bench gpu` needs Transformer Engine, which is not installed"):
        bench_gpu.choose("cuda", None)


def test_targets_are_ratios_of_what_was_measured():
    from flexolmo_megatron.training.bench_gpu import SEVEN_B, Result
    from flexolmo_megatron.training.bench_speed import Speed

    def speed(what, tflops):
        return Speed(what, 1.0, 10, int(tflops * 1e12), None)

    result = Result(H100, "2.9", SEVEN_B, "tensorwise", peak={"bf16": 100.0})
    result.pair = [speed("ours, bf16", 60), speed("stock, bf16", 50), speed("ours, FP8 tensorwise", 81)]
    result.grouped = [speed("one matrix, bf16", 80), speed("8 experts, even, bf16", 56)]
    measured = [(target.measured, target.met) for target in result.targets()]
    ratios = [(pytest.approx(0.6), True), (pytest.approx(1.35), True), (pytest.approx(1.2), False)]
    assert measured == [*ratios, (pytest.approx(0.7), False), (None, None)]
    assert result.share(result.pair[0]) == pytest.approx(0.6)


def test_layers_that_fit():
    from flexolmo_megatron.training.bench_gpu import SEVEN_B
    from flexolmo_megatron.training.bench_speed import fitting_layers

    # 2 bytes for each of two experts (135,266,304 each) and attention (67,108,864), 16 more for the experts, and
    # 34 * 4096 + 12 * 11008 bytes per token; beside them embedding and head in bf16 and 14 bytes per logit.
    layer = 2 * (2 * 135_266_304 + 67_108_864) + 16 * 2 * 135_266_304 + 8192 * (34 * 4096 + 12 * 11008)
    ends = 2 * 2 * 411_041_792 + 14 * 8192 * 100_352
    model = SEVEN_B.model(1)
    assert fitting_layers(model, 8192, int((ends + 7 * layer) / 0.9) + 10) == 7
    assert fitting_layers(model, 8192, int((ends + 7 * layer) / 0.9) - 10) == 6
    assert fitting_layers(model, 8192, 1 << 30) == 1


def test_fewer_layers_where_memory_runs_out():
    from flexolmo_megatron.training.bench_gpu import with_fewer_layers

    tried = []

    def measure(layers):
        tried.append(layers)
        if layers > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "speeds"

    limit = 4
    assert with_fewer_layers(measure, 9) == (4, "speeds") and tried == [9, 6, 4]
    limit = 0
    with pytest.raises(FlexOlmoError, match="does not hold one layer of the pair"):
        with_fewer_layers(measure, 1)
