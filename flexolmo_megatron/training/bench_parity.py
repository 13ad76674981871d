"""Transformer Engine against the local modules on the same weights: how far each is from fp32.

The reference is the local path in fp32, with weights and inputs that bf16 can hold, so that rounding starts inside the
model. Errors are relative: the norm of the difference over the norm of the reference, over all elements. The merged FFN
layer is compared alone and on given inputs: its router computes in fp32 everywhere, so that all variants send the same
tokens to the same experts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.backends import BackendSpecProvider
from torch import Tensor, nn

from flexolmo_megatron.config.card import ModelCard, numbered_experts
from flexolmo_megatron.config.layout import ModelKind
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.inference.access import only_allowed
from flexolmo_megatron.model.builder import block_spec, build_model
from flexolmo_megatron.model.config import transformer_config
from flexolmo_megatron.model.engine import engine_settings, prepare_engine
from flexolmo_megatron.model.fp8 import fp8_settings
from flexolmo_megatron.model.spec import TorchSpecProvider
from flexolmo_megatron.model.weights import live_model, load_anchor, load_weights
from flexolmo_megatron.runtime.setup import local_device
from flexolmo_megatron.training.bench_steps import halves, random_batch
from flexolmo_megatron.training.freezing import freeze_anchor

_SPREAD = 0.7355 / math.sqrt(3)
"""Root mean square of rounding to the nearest, relative to the value, in halves of a last place: the error is spread
evenly over it, values over their logarithm."""
BF16, E4M3, E5M2 = (2.0**-bits * _SPREAD for bits in (8, 4, 3))
"""That for each number format: 0.17 %, 2.7 % and 5.3 %."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    what: str
    error: float
    tolerance: float
    reason: str
    """Where the tolerance comes from."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # not for NaN


@dataclass(frozen=True)
class Variant:
    """One way of computing."""

    name: str
    backend: BackendSpecProvider
    dtype: torch.dtype
    recipe: str | None = None
    drop_frozen: bool = False

    @property
    def passes(self) -> int:
        """How many passes to take, of which the last counts: delayed scaling has no scales in its first one."""
        return 3 if self.recipe == "delayed" else 1


PARTS = ("output", "gradients", "router's gradient")
"""What is compared; of gradients the tensor with the largest error counts."""


@dataclass
class _Result:
    output: Tensor
    gradients: dict[str, Tensor]

    def errors(self, reference: "_Result") -> tuple[float, float, float]:
        """Those of ``PARTS``."""
        assert self.gradients.keys() == reference.gradients.keys()
        gradients = {name: _relative(value, reference.gradients[name]) for name, value in self.gradients.items()}
        routers = [error for name, error in gradients.items() if "router" in name]
        others = [error for name, error in gradients.items() if "router" not in name]
        return _relative(self.output, reference.output), max(others), max(routers)


def _relative(value: Tensor, reference: Tensor) -> float:
    # Accumulated in fp64: a norm over millions of elements.
    difference = (value.double() - reference.double()).norm() / reference.double().norm()
    return difference.item()


def variants(engine: BackendSpecProvider | None, recipe: str | None) -> tuple[Variant, Variant, list[Variant]]:
    """The reference, the local path in bf16, and Transformer Engine's variants.

    Args:
        engine: Transformer Engine's modules; None where it cannot run.
        recipe: of FP8; None where the chip has none.
    """
    local, engines = TorchSpecProvider(), []
    if engine is not None:
        engines.append(Variant("Transformer Engine, bf16", engine, torch.bfloat16))
        if recipe is not None:
            engines.append(Variant(f"Transformer Engine, FP8 {recipe}", engine, torch.bfloat16, recipe))
    return Variant("local, fp32", local, torch.float32), Variant("local, bf16", local, torch.bfloat16), engines


def _build(variant: Variant, model: ModelConfig, kind: ModelKind) -> nn.Module:
    settings = fp8_settings(variant.recipe)
    if not isinstance(variant.backend, TorchSpecProvider):
        settings |= engine_settings(kind, variant.recipe)
    config = transformer_config(model, kind, dtype=variant.dtype, **settings)
    built = build_model(model, kind, config, spec=block_spec(kind, config, variant.backend))
    return built.to(local_device()).train()


def _wrapped(variant: Variant, model: nn.Module) -> DistributedDataParallel:
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    prepare_engine(chunk, variant.recipe, variant.drop_frozen)
    return chunk


@torch.no_grad()
def _round(model: nn.Module, router_std: float) -> nn.Module:
    """Give routers weights of that size (upstream's are so small that all experts weigh the same); round all."""
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.normal_(std=router_std)
        parameter.copy_(parameter.bfloat16())
    return model


# The coupled pair.


def _random_pair(reference: Variant, model: ModelConfig) -> tuple[LazyModel, LazyModel]:
    """Anchor and owner's part of a random pair."""
    pair = _round(_build(reference, model, "pair"), 1 / math.sqrt(model.hidden_size))
    return halves(pair, model)


def _run_pair(variant: Variant, anchor: LazyModel, own: LazyModel, batch: dict[str, Tensor]) -> _Result:
    model = _build(variant, own.card.model, "pair")
    load_anchor(model, anchor)
    load_weights(model, own)
    freeze_anchor(model)
    chunk = _wrapped(variant, model)
    for _ in range(variant.passes):
        chunk.zero_grad_buffer()
        chunk.set_is_first_microbatch()
        logits = chunk(batch["tokens"], batch["positions"], None)
        nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten()).backward()
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return _Result(logits.detach(), gradients)


def check_pair(
    model: ModelConfig,
    sequences: int,
    reference: Variant,
    plain: Variant,
    engines: list[Variant],
) -> Iterator[Check]:
    """Compare logits and trained gradients of one pass of an owner's run.

    Args:
        model: the pair (num_experts = top_k = 2).
        sequences: of model.max_position_embeddings tokens.
        reference: from ``variants``, as the others.
        plain: the local path in bf16.
        engines: Transformer Engine's.
    """
    batch = random_batch(model, sequences, model.max_position_embeddings)
    anchor, own = _random_pair(reference, model)
    expected = _run_pair(reference, anchor, own, batch)
    in_series = 4 * model.num_layers
    run = partial(_run_pair, anchor=anchor, own=own, batch=batch)
    yield from _compare("pair", expected, plain, engines, in_series, run)
    for variant in engines:
        if variant.recipe is not None:
            kept, dropped = (
                _run_pair(replace(variant, drop_frozen=drop), anchor, own, batch).output for drop in (False, True)
            )
            what = f"pair, output: {variant.name}, frozen weights in FP8 only"
            yield Check(what, _relative(dropped, kept), 0, "the same FP8 weights as with their bf16 copies")


# The merged FFN layer.


def _random_mixture(reference: Variant, model: ModelConfig) -> LazyModel:
    mixture = _round(_build(reference, model, "moe"), 1 / math.sqrt(model.hidden_size))
    return live_model(mixture, ModelCard("moe", model, numbered_experts(model.num_experts)))


def _expert_weights(layer: nn.Module, experts: int) -> dict[str, nn.Parameter]:
    """Weights of a merged layer under the same names for grouped and for single experts."""
    found = {"router": layer.router.weight}
    for index in range(experts):
        for name in ("linear_fc1", "linear_fc2"):
            if hasattr(layer.experts, "local_experts"):
                found[f"{index}.{name}"] = getattr(layer.experts.local_experts[index], name).weight
            else:
                found[f"{index}.{name}"] = getattr(getattr(layer.experts, name), f"weight{index}")
    return found


def _run_layer(
    variant: Variant, weights: LazyModel, hidden: Tensor, allowed_BE: Tensor | None, spoilt: list[int] | None = None
) -> _Result:
    """Forward and backward of a merged layer; ``spoilt`` experts have NaN for weights."""
    size = weights.card.model
    model = _build(variant, size, "moe")
    load_weights(model, weights)
    layer = model.decoder.layers[0].mlp
    parameters = _expert_weights(layer, size.num_experts)
    with torch.no_grad():
        for index in spoilt or []:
            for name in ("linear_fc1", "linear_fc2"):
                parameters[f"{index}.{name}"].fill_(float("nan"))
    chunk = _wrapped(variant, model)
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    for _ in range(variant.passes):
        chunk.zero_grad_buffer()
        chunk.set_is_first_microbatch()
        hidden = hidden.detach().to(variant.dtype, copy=True).requires_grad_()
        with only_allowed(model, allowed_BE), get_fp8_context(model.config, 0):
            output, _ = layer(hidden)
        if not spoilt:
            output.backward(probe.to(output))
    if spoilt:
        return _Result(output.detach(), {})
    used = [index for index in range(size.num_experts) if allowed_BE is None or allowed_BE[:, index].any()]
    names = ["router", *(f"{index}.{name}" for index in used for name in ("linear_fc1", "linear_fc2"))]
    gradients = {name: parameters[name].main_grad.clone() for name in names}
    return _Result(output.detach(), {"hidden": hidden.grad, **gradients})


def check_layer(
    model: ModelConfig,
    sequences: int,
    reference: Variant,
    plain: Variant,
    engines: list[Variant],
) -> Iterator[Check]:
    """Compare outputs and gradients of a merged layer, with all experts and with two of them excluded.

    Args:
        model: the merged model; one layer of it is used.
        sequences: of model.max_position_embeddings tokens.
        reference: from ``variants``, as the others.
        plain: the local path in bf16.
        engines: Transformer Engine's.
    """
    model = replace(model, num_layers=1)
    hidden = torch.randn(model.max_position_embeddings, sequences, model.hidden_size, device=local_device()).bfloat16()
    weights = _random_mixture(reference, model)
    excluded = [1, model.num_experts - 1]
    allowed_BE = torch.ones(sequences, model.num_experts, dtype=torch.bool)
    allowed_BE[:, excluded] = False
    for what, mask in (("merged layer", None), ("merged layer, two experts excluded", allowed_BE)):
        expected = _run_layer(reference, weights, hidden, mask)
        run = partial(_run_layer, weights=weights, hidden=hidden, allowed_BE=mask)
        yield from _compare(what, expected, plain, engines, 2, run)
    for variant in [plain, *engines]:
        sound = _run_layer(variant, weights, hidden, allowed_BE).output
        spoilt = _run_layer(variant, weights, hidden, allowed_BE, excluded).output
        what, tolerance = f"merged layer, excluded experts hold NaN: {variant.name}", 0.0
        reason = "what is excluded is not computed"
        if variant is plain:  # upstream's unfused kernels; where NaN got through, the error is NaN
            tolerance, reason = 4 * BF16, f"{reason}; a GPU adds up a token's experts in any order"
        yield Check(what, _relative(spoilt, sound), tolerance, reason)


def _compare(
    what: str,
    expected: _Result,
    plain: Variant,
    engines: list[Variant],
    in_series: int,
    run: Callable[[Variant], _Result],
) -> Iterator[Check]:
    """Checks of output and gradients of every variant.

    Tolerances, for ``in_series`` products between input and output: independent roundings add up in quadrature, and
    each product has two rounded operands (in bf16 also a rounded result). A gradient passes the products of the forward
    pass and those of the backward pass, where one operand is a gradient. Twice that is allowed, because small values of
    a tensor are rounded more coarsely than large ones, and roundings are not fully independent. A router's gradient is
    what remains of the experts' outputs after the norm has taken out their common size, a difference of large terms:
    four times.
    """
    for variant in (plain, *engines):
        if variant.recipe is None:
            forward = backward = 3 * BF16**2
            kind = f"bf16 ({BF16:.2%})"
        else:
            forward, backward = 2 * E4M3**2, E4M3**2 + E5M2**2
            kind = f"E4M3 ({E4M3:.1%}) and E5M2 ({E5M2:.1%})"
        once, both = math.sqrt(in_series * forward), math.sqrt(in_series * (forward + backward))
        errors = run(variant).errors(expected)
        for part, error, rounding, factor in zip(PARTS, errors, (once, both, both), (2, 2, 4), strict=True):
            reason = f"{factor} x rounding to {kind} in {in_series} products in series"
            yield Check(f"{what}, {part}: {variant.name}", error, factor * rounding, reason)
