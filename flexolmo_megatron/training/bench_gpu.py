"""``flexolmo bench gpu``: is Transformer Engine right, and how fast is this package on this card?

On one GPU: Transformer Engine's modules against the local ones (``bench_parity.py``); then speeds at 7B widths next to
stock Megatron and to the card's own matrix products, measured in the same run (``bench_speed.py``). On the CPU the same
steps run at tiny sizes with the local modules: a test of this program, whose speeds say nothing about a GPU.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from megatron.core.models.backends import BackendSpecProvider
from tqdm import tqdm

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.fp8 import Chip, check_engine, check_recipe, this_chip
from flexolmo_megatron.model.spec import default_backend, engine_is_default
from flexolmo_megatron.runtime.setup import initialize
from flexolmo_megatron.training.bench_parity import Check, check_layer, check_pair, variants
from flexolmo_megatron.training.bench_speed import (
    Products,
    Speed,
    dtype_label,
    fitting_layers,
    fp8_peak,
    matmul_peak,
    measure_grouped,
    measure_layer,
    measure_pair,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    hidden: int
    ffn: int
    heads: int
    vocab: int
    length: int
    """Tokens in a sequence."""
    sequences: int
    """In a step."""
    experts: int
    top_k: int
    peak: int
    """Side of the square matrix product that measures the peak."""
    parity_hidden: int
    parity_ffn: int
    parity_length: int

    def model(self, layers: int, *, merged: bool = False) -> ModelConfig:
        """The pair, or the merged model, with that many layers."""
        experts, top_k = (self.experts, self.top_k) if merged else (2, 2)
        return ModelConfig(
            num_layers=layers,
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn,
            num_attention_heads=self.heads,
            num_query_groups=self.heads,
            vocab_size=self.vocab,
            max_position_embeddings=self.length,
            num_experts=experts,
            top_k=top_k,
        )

    def parity_model(self, *, merged: bool) -> ModelConfig:
        """A smaller one of two layers with few words, for comparisons with fp32."""
        return replace(
            self.model(2, merged=merged),
            hidden_size=self.parity_hidden,
            ffn_hidden_size=self.parity_ffn,
            num_attention_heads=8,
            num_query_groups=8,
            vocab_size=min(self.vocab, 4096),
            max_position_embeddings=self.parity_length,
        )


SEVEN_B = Sizes(4096, 11008, 32, 100352, 4096, 2, 8, 4, 8192, 1024, 2816, 512)
TINY = Sizes(64, 96, 4, 256, 32, 2, 8, 4, 128, 64, 96, 32)


@dataclass(frozen=True)
class Target:
    """A ratio that is wanted on one H200."""

    what: str
    wanted: float
    measured: float | None
    """None where it was not measured: on the CPU, or on a chip without FP8."""

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured >= self.wanted


@dataclass
class Result:
    """Everything that ``flexolmo bench gpu`` has found."""

    chip: Chip
    torch: str
    sizes: Sizes
    recipe: str | None
    """Of FP8; None where the chip has none."""
    layers: int = 0
    """Of the pair."""
    checks: list[Check] = field(default_factory=list)
    products: Products | None = None
    peak: dict[str, float] = field(default_factory=dict)
    """10^12 operations per second of torch's matrix product by type."""
    pair: list[Speed] = field(default_factory=list)
    layer: list[Speed] = field(default_factory=list)
    grouped: list[Speed] = field(default_factory=list)
    seconds: float = 0.0
    """The whole run took."""

    @property
    def on_gpu(self) -> bool:
        return bool(self.chip.name)

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its tolerance and only needed products were launched."""
        return all(check.passed for check in self.checks) and self.products is not None and self.products.passed

    def share(self, speed: Speed) -> float | None:
        """Of the measured bf16 peak; None on the CPU."""
        return speed.tflops / self.peak["bf16"] if self.on_gpu else None

    def targets(self) -> list[Target]:
        """The targets, with what was measured on a GPU beside them."""
        by_name = {speed.what: speed for speed in [*self.pair, *self.grouped]}

        def ratio(above: str, below: str | None = None) -> float | None:
            if not self.on_gpu or above not in by_name or (below is not None and below not in by_name):
                return None
            reference = self.peak["bf16"] if below is None else by_name[below].tflops
            return by_name[above].tflops / reference

        fp8, experts = f"FP8 {self.recipe}", f"{self.sizes.experts} experts, even"
        return [
            Target("pair step, bf16: share of the measured bf16 peak", 0.55, ratio("ours, bf16")),
            Target("pair step, FP8 over bf16", 1.35, ratio(f"ours, {fp8}", "ours, bf16")),
            Target("pair step, bf16, ours over stock", 1.4, ratio("ours, bf16", "stock, bf16")),
            Target("grouped over single product, bf16", 0.75, ratio(f"{experts}, bf16", "one matrix, bf16")),
            Target("grouped over single product, FP8", 0.75, ratio(f"{experts}, {fp8}", f"one matrix, {fp8}")),
        ]

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values: numbers with their units in the names, and nothing measured twice."""
        speeds = {
            name: [
                asdict(speed)
                | {
                    "tokens_per_second": speed.tokens_per_second,
                    "tflops": speed.tflops,
                    "share_of_bf16_peak": self.share(speed),
                }
                for speed in getattr(self, name)
            ]
            for name in ("pair", "layer", "grouped")
        }
        return {
            "device": "gpu" if self.on_gpu else "cpu",
            "chip": asdict(self.chip),
            "torch": self.torch,
            "sizes": asdict(self.sizes),
            "layers": self.layers,
            "fp8_recipe": self.recipe,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "products": asdict(self.products) | {"passed": self.products.passed},
            "peak_tflops": self.peak,
            **speeds,
            "targets": [asdict(target) | {"met": target.met} for target in self.targets()],
            "passed": self.passed,
            "seconds": self.seconds,
        }


def default_recipe(chip: Chip) -> str | None:
    """The recipe that is measured if none is named: the first of these that the chip runs; None for none of them."""
    for name in ("mxfp8", "tensorwise"):
        try:
            check_recipe(name, chip)
        except FlexOlmoError:
            continue
        return name
    return None


def choose(device: str, recipe: str | None) -> tuple[Chip, str | None]:
    """Check what was asked for against this machine, before anything is built.

    Args:
        device: cuda or cpu.
        recipe: name of an FP8 recipe; None for the chip's default.

    Returns:
        The chip, without a name for the CPU, and the recipe, None without FP8.

    Raises:
        FlexOlmoError: there is no GPU or no Transformer Engine, or the chip does not run the recipe.
    """
    chip = this_chip()
    if device == "cuda":
        if not chip.name:
            raise FlexOlmoError(
                "`flexolmo bench gpu` needs an NVIDIA GPU, and this machine has no CUDA device: with --device cpu it "
                "only tests itself, at tiny sizes"
            )
        check_engine(chip, "`flexolmo bench gpu`")
        if recipe is None:
            return chip, default_recipe(chip)
        check_recipe(recipe, chip)
        return chip, recipe
    if chip.name:
        raise FlexOlmoError("--device cpu is for machines without a GPU: this one has a " + chip.name)
    if recipe is not None:
        raise FlexOlmoError(f"--recipe {recipe} with --device cpu: FP8 needs a GPU")
    return chip, None


def bench_gpu(chip: Chip, recipe: str | None, *, layers: int | None = None, rounds: int = 10, seed: int = 0) -> Result:
    """Compare and measure.

    Args:
        chip: from ``choose``, as the recipe.
        recipe: of FP8; None leaves FP8 out.
        layers: of the pair; None for as many as fit.
        rounds: timed steps of each contestant.
        seed: of weights and tokens.
    """
    began = time.perf_counter()
    initialize(seed=seed)
    torch.manual_seed(seed)
    sizes = SEVEN_B if chip.name else TINY
    result = Result(chip, torch.__version__, sizes, recipe)
    _say("comparing Transformer Engine with the local modules")
    result.checks = list(compare(sizes, default_backend() if engine_is_default() else None, recipe))
    _say("measuring the matrix product's peak")
    result.peak[dtype_label()] = matmul_peak(sizes.peak, rounds)
    if recipe is not None:
        result.peak["fp8"] = fp8_peak(sizes.peak, rounds)
    tokens = sizes.sequences * sizes.length
    if layers is None:
        layers = fitting_layers(sizes.model(1), tokens, torch.cuda.mem_get_info()[0]) if chip.name else 2

    def pair(layers: int) -> tuple[list[Speed], Products]:
        _say(f"measuring the pair step with {layers} layers")
        return measure_pair(sizes.model(layers), sizes.sequences, recipe, rounds)

    result.layers, (result.pair, result.products) = with_fewer_layers(pair, layers)
    _say("measuring the merged layer")
    merged = sizes.model(1, merged=True)
    result.layer = measure_layer(merged, sizes.sequences, recipe, rounds)
    _say("measuring the grouped matrix product")
    result.grouped = measure_grouped(merged, tokens * sizes.top_k, recipe, rounds)
    result.seconds = time.perf_counter() - began
    return result


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def compare(sizes: Sizes, engine: BackendSpecProvider | None, recipe: str | None) -> Iterator[Check]:
    """Compare all ways of computing with the local path in fp32.

    Args:
        sizes: their parity sizes are used.
        engine: Transformer Engine's modules; None where it cannot run.
        recipe: of FP8; None leaves FP8 out.
    """
    reference, plain, engines = variants(engine, recipe)
    yield from check_pair(sizes.parity_model(merged=False), sizes.sequences, reference, plain, engines)
    yield from check_layer(sizes.parity_model(merged=True), sizes.sequences, reference, plain, engines)


def with_fewer_layers(measure: Callable[[int], T], layers: int) -> tuple[int, T]:
    """Measure with that many layers, or, while the GPU's memory runs out, with a quarter fewer.

    Raises:
        FlexOlmoError: not even one layer fits.
    """
    while True:
        try:
            return layers, measure(layers)
        except torch.OutOfMemoryError as error:
            # The failed attempt's tensors are held by the error's frames.
            error.__traceback__ = None
        if layers == 1:
            raise FlexOlmoError("the GPU's memory does not hold one layer of the pair at 7B widths and its optimizer")
        layers = max(1, layers * 3 // 4)
