"""How fast the pair step, the merged FFN layer and the grouped matrix product are, next to the chip's matrix products.

Each contestant is built, measured and freed by itself: with as many layers as fit, two would not fit side by side.
Stock is Megatron's own MoELayer and router in the same layers, with the research code's method for an owner's run
(arXiv 2507.07024): gradients for both experts, the anchor's set to zero after the backward pass, Adam over both. It has
every setting of ours otherwise: Transformer Engine, fused kernels, frozen attention.
"""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from flexolmo_megatron.config.layout import ModelKind
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.precision import Fp8Config
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.model.builder import block_spec, build_model
from flexolmo_megatron.model.config import transformer_config
from flexolmo_megatron.model.engine import engine_settings
from flexolmo_megatron.model.fp8 import RECIPES
from flexolmo_megatron.runtime.setup import local_device
from flexolmo_megatron.training.bench_steps import (
    Z_LOSS,
    megatron_step,
    random_batch,
    stock_spec,
    synchronize,
    train_ffns_but_mask_anchor,
)
from flexolmo_megatron.training.flops import Product, mixture_products, pair_flops, pair_products, total
from flexolmo_megatron.training.freezing import freeze_anchor
from flexolmo_megatron.training.gemms import count_gemms
from flexolmo_megatron.training.optimization import build_optimizer
from flexolmo_megatron.training.start import wrap

WARM = 3


@dataclass(frozen=True)
class Speed:
    """A measured speed; seconds are the median of the rounds."""

    what: str
    seconds: float
    tokens: int
    """Per step."""
    flops: int
    """Operations that the work needs (``training/flops.py``), whatever was launched."""
    peak_bytes: int | None
    """Highest memory that torch allocated on the GPU; None on the CPU."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        """10^12 operations per second."""
        return self.flops / self.seconds / 1e12


@dataclass(frozen=True)
class Products:
    """Matrix products that one pair step launches."""

    launched: int
    needed: int
    """By count of the layers' products."""
    extra: int
    """Products that upstream launches although nobody needs their result."""
    frozen: int
    """Weight gradients of frozen weights, had they been computed too."""

    @property
    def passed(self) -> bool:
        return self.launched == self.needed + self.extra


def compute_dtype() -> torch.dtype:
    """bf16 on a GPU; on the CPU fp32, where bf16 is slow."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def dtype_label() -> str:
    """``compute_dtype`` in the names of what is measured."""
    return "bf16" if compute_dtype() is torch.bfloat16 else "fp32"


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median of seconds that ``work`` takes, after it has run ``WARM`` times."""
    for _ in range(WARM):
        work()
    seconds = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _forget_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _build(model: ModelConfig, kind: ModelKind, recipe: str | None, stock: bool = False) -> GPTModel:
    settings = engine_settings(kind, recipe)
    loss = {} if kind == "dense" else {"moe_z_loss_coeff": Z_LOSS}
    config = transformer_config(model, kind, dtype=compute_dtype(), **loss, **settings)
    spec = stock_spec(config) if stock else block_spec(kind, config)
    return build_model(model, kind, config, spec=spec).to(local_device())


# The chip itself.


def matmul_peak(size: int, rounds: int) -> float:
    """10^12 operations per second of torch's matrix product, the best of a square and of a long shape, in our type."""
    best = 0.0
    for rows, inner, columns in ((size, size, size), (2 * size, size // 2, 2 * size)):
        left = torch.randn(rows, inner, device=local_device(), dtype=compute_dtype())
        right = torch.randn(columns, inner, device=local_device(), dtype=compute_dtype())
        seconds = timed(lambda left=left, right=right: left @ right.t(), rounds)
        best = max(best, Product("peak", rows, inner, columns).flops / seconds / 1e12)
    return best


def fp8_peak(size: int, rounds: int) -> float:
    """The same for E4M3 with one scale per tensor (``torch._scaled_mm``, fast accumulation), on a GPU that has it."""
    one = torch.ones((), device=local_device())
    left, right = (torch.randn(size, size, device=local_device()).to(torch.float8_e4m3fn) for _ in range(2))

    def multiply() -> Tensor:
        return torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / timed(multiply, rounds) / 1e12


# The pair step.


def fitting_layers(model: ModelConfig, tokens: int, free_bytes: int) -> int:
    """Layers of the stock contestant, which needs the most, that fit beside embedding, head and logits; at least 1.

    Counted: bf16 weights; fp32 gradients, master weights and two moments of both experts; what the backward pass keeps;
    logits in bf16 and three times in fp32. A tenth is left free.

    Args:
        model: the pair.
        tokens: in a step.
        free_bytes: of the GPU's memory.
    """
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    experts, attention = 6 * hidden * inner, 4 * hidden * hidden
    kept = tokens * (34 * hidden + 12 * inner)
    ends = 2 * 2 * model.vocab_size * hidden + tokens * model.vocab_size * 14
    layer = 2 * (experts + attention) + 16 * experts + kept
    return max(1, int((0.9 * free_bytes - ends) // layer))


def _trainer(model: GPTModel, recipe: str | None, batch: dict[str, Tensor], mask: Callable[[], None]) -> Callable:
    """A training step of a model wrapped as in a run; ``mask`` runs between the backward pass and the optimizer."""
    config = TrainConfig(out="", bf16=compute_dtype() is torch.bfloat16, fp8=Fp8Config(recipe))
    [chunk] = wrap(config, [model])
    return partial(megatron_step, chunk, build_optimizer(config, [chunk]), batch, mask)


def _ours(model: ModelConfig, recipe: str | None, batch: dict[str, Tensor]) -> Callable[[], float]:
    pair = _build(model, "pair", recipe)
    freeze_anchor(pair)
    return _trainer(pair, recipe, batch, lambda: None)


def _stock(model: ModelConfig, recipe: str | None, batch: dict[str, Tensor]) -> Callable[[], float]:
    mixture = _build(model, "moe", recipe, stock=True)
    mask = train_ffns_but_mask_anchor(mixture)
    return _trainer(mixture, recipe, batch, mask)


def measure_pair(model: ModelConfig, sequences: int, recipe: str | None, rounds: int) -> tuple[list[Speed], Products]:
    """Speed of the training step, ours and stock, and the number of products that ours launches.

    Args:
        model: the pair, with the number of layers to build.
        sequences: of model.max_position_embeddings tokens in a step.
        recipe: of FP8; None leaves FP8 out.
        rounds: timed steps.
    """
    length = model.max_position_embeddings
    batch = random_batch(model, sequences, length)
    dtype = dtype_label()
    plan = [(f"ours, {dtype}", _ours, None), (f"stock, {dtype}", _stock, None)]
    if recipe is not None:
        plan += [(f"ours, FP8 {recipe}", _ours, recipe), (f"stock, FP8 {recipe}", _stock, recipe)]
    speeds, products = [], None
    for what, build, used in plan:
        _forget_peak()
        step = build(model, used, batch)
        seconds, flops = timed(step, rounds), pair_flops(model, sequences, length)
        speeds.append(Speed(what, seconds, sequences * length, flops, _peak()))
        if products is None:
            products = _count(model, sequences * length, step)
        del step
    _forget_peak()
    return speeds, products


def _count(model: ModelConfig, tokens: int, step: Callable[[], float]) -> Products:
    # Per layer qkv, proj and the anchor's two matrices; and the head.
    frozen = 4 * model.num_layers + 1
    # Upstream's router computes its input's gradient in the first layer too.
    return Products(count_gemms(step).calls, len(pair_products(model, tokens)), 1, frozen)


# The merged layer and its grouped product.


def measure_layer(model: ModelConfig, sequences: int, recipe: str | None, rounds: int) -> list[Speed]:
    """Speed of one merged FFN layer, forward and backward with all of its weights trained.

    Args:
        model: the merged model; one layer of it is built.
        sequences: of model.max_position_embeddings tokens.
        recipe: of FP8; None leaves FP8 out.
        rounds: timed passes.
    """
    model = replace(model, num_layers=1, vocab_size=256)
    shape = (model.max_position_embeddings, sequences, model.hidden_size)
    tokens = shape[0] * shape[1]
    dtype = dtype_label()
    plan = [(f"ours, {dtype}", False, None), (f"stock, {dtype}", True, None)]
    if recipe is not None:
        plan.append((f"ours, FP8 {recipe}", False, recipe))
    speeds = []
    for what, stock, used in plan:
        _forget_peak()
        built = _build(model, "moe", used, stock)
        layer = built.decoder.layers[0].mlp
        hidden = torch.randn(shape, device=local_device(), dtype=compute_dtype(), requires_grad=True)
        gradient = torch.randn_like(hidden)

        def both(built=built, layer=layer, hidden=hidden, gradient=gradient) -> None:
            built.zero_grad(set_to_none=True)
            hidden.grad = None
            built.set_is_first_microbatch()
            with _quantised(built):
                output, _ = layer(hidden)
            output.backward(gradient)

        speeds.append(Speed(what, timed(both, rounds), tokens, total(mixture_products(model, tokens)), _peak()))
        del built, layer, both
    _forget_peak()
    return speeds


def _quantised(built: GPTModel) -> AbstractContextManager:
    return get_fp8_context(built.config, 0) if built.config.fp8 else nullcontext()


def measure_grouped(model: ModelConfig, rows: int, recipe: str | None, rounds: int) -> list[Speed]:
    """Speed of the experts' first matrix as one grouped product, next to one matrix for all rows.

    Args:
        model: the merged model, of which sizes and number of experts are used.
        rows: that all experts get together; even shares, and half of them for the first expert.
        recipe: of FP8; None leaves FP8 out.
        rounds: timed products.
    """
    model, experts = replace(model, num_layers=1, vocab_size=256), model.num_experts
    multiple = RECIPES[recipe].multiple if recipe else 1
    rest = rows // 2 // (experts - 1) // multiple * multiple
    half_to_one = [rows - rest * (experts - 1), *[rest] * (experts - 1)]
    splits = {"even": [rows // experts] * experts, "half to one": half_to_one}
    hidden = torch.randn(rows, model.hidden_size, device=local_device(), dtype=compute_dtype())
    dtype = dtype_label()
    flops = Product("fc1", rows, model.hidden_size, 2 * model.ffn_hidden_size).flops
    speeds = []
    for used in dict.fromkeys((None, recipe)):
        label = dtype if used is None else f"FP8 {used}"
        dense = _build(replace(model, num_experts=0, top_k=0), "dense", used)
        merged = _build(model, "moe", used)
        work = {f"one matrix, {label}": (dense, partial(dense.decoder.layers[0].mlp.linear_fc1, hidden))}
        for name, split in splits.items():
            call = partial(_grouped, merged.decoder.layers[0].mlp.experts, hidden, split)
            work[f"{experts} experts, {name}, {label}"] = (merged, call)
        for what, (built, call) in work.items():
            with torch.no_grad(), _quantised(built):
                speeds.append(Speed(what, timed(call, rounds), rows, flops, None))
        del dense, merged, work
        _forget_peak()
    return speeds


def _grouped(experts: nn.Module, hidden: Tensor, split: list[int]) -> object:
    if hasattr(experts, "local_experts"):
        parts = hidden.split(split)
        return [expert.linear_fc1(part) for expert, part in zip(experts.local_experts, parts, strict=True)]
    return experts.linear_fc1(hidden, split)
