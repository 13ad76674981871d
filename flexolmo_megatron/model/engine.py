"""What Transformer Engine's modules need beyond their construction: settings, and care for frozen weights.

How Transformer Engine (v2.10, v2.11: pytorch/module/linear.py and grouped_linear.py) treats a weight that does not
require a gradient: the input is not kept for the backward pass and the weight-gradient product is not launched
(``ctx.requires_wgrad``), main_grad is not touched. Two things it does not do:

- With FP8 it quantises every weight again whenever ``is_first_microbatch`` is True, which Megatron's schedule sets in
  each step on every module (``MegatronModule.set_is_first_microbatch``), frozen or not.
- ``GroupedLinear`` looks at its first weight alone: where that is frozen, no expert gets a gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from flexolmo_megatron.config.layout import ModelKind
from flexolmo_megatron.model.fp8 import fp8_settings
from flexolmo_megatron.model.spec import engine_is_default


def engine_settings(kind: ModelKind, recipe: str | None = None) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig with which Transformer Engine's modules run fastest.

    None where models are not built from those.

    Args:
        kind: dense, pair or moe.
        recipe: of FP8; None for bf16.
    """
    if not engine_is_default():
        return {}
    settings: dict[str, Any] = dict(apply_rope_fusion=True, bias_activation_fusion=True, **fp8_settings(recipe))
    if kind == "moe":
        settings |= dict(moe_grouped_gemm=True, moe_permute_fusion=True)
    return settings


def engine_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield Transformer Engine's linear modules, grouped ones too: those that keep quantised weights."""
    return (module for module in model.modules() if hasattr(module, "is_first_microbatch"))


def weight_names(module: nn.Module) -> list[str]:
    """Names of a linear module's weights: ``weight``, or ``weight0``, ``weight1``, … of a grouped one."""
    return [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight")]


def prepare_engine(chunk: DistributedDataParallel, recipe: str | None, drop_frozen: bool = False) -> int:
    """Set up Transformer Engine's modules of a model that is loaded, frozen and wrapped; does nothing without them.

    Trained weights get their gradients added into DDP's fp32 buffers by the matrix product itself. With FP8, frozen
    weights are quantised here, once, and never again.

    Args:
        chunk: this rank's model, or one of its virtual pipeline stages.
        recipe: of FP8; None for bf16.
        drop_frozen: with FP8, keep frozen weights in FP8 only. Their bf16 values are gone: they can then be neither
            saved nor digested, which an expert run needs neither of (its anchor is a reference).

    Returns:
        The number of frozen weights that were quantised.

    Raises:
        ValueError: only some experts of a grouped module are frozen, which Transformer Engine would not respect.
    """
    trained, quantised = [], 0
    for module in engine_modules(chunk):
        needs = {getattr(module, name).requires_grad for name in weight_names(module)}
        if len(needs) > 1:
            raise ValueError("only some experts of a grouped module train: Transformer Engine takes all or none")
        if needs == {True}:
            module.fuse_wgrad_accumulation = True
            trained.append(module)
        elif recipe is not None:
            quantised += _quantise_once(module, recipe, drop_frozen)
    # Upstream fills this list with all modules when the first step asks for it, and takes it as it is where it exists.
    chunk.modules_with_is_first_microbatch = trained
    return quantised


@torch.no_grad()
def _quantise_once(module: nn.Module, recipe: str, drop: bool) -> int:
    names = weight_names(module)
    for name in names:
        weight = getattr(module, name)
        quantised = _weight_quantizer(recipe)(weight.detach())
        if drop:
            parameter = nn.Parameter(quantised, requires_grad=False)
            for attribute, value in vars(weight).items():  # Megatron's marks: allreduce, partition_dim, …
                setattr(parameter, attribute, value)
            setattr(module, name, parameter)
        else:
            module._fp8_workspaces[name] = quantised
    # The forward pass takes what is cached, or a weight that is quantised already, as it is.
    module.is_first_microbatch = False
    return len(names)


def _weight_quantizer(recipe: str) -> Any:
    """Transformer Engine's quantizer for a weight that will not change.

    Delayed scaling would take a scale of 1 for the first step: without a past there is no largest value. A weight that
    does not change is scaled by its own largest value instead; both are the same kind of tensor, with its scale in it.
    """
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch.quantization import RecipeState

    formats = recipes.Format
    scaling = {
        "delayed": lambda: recipes.Float8CurrentScaling(fp8_format=formats.HYBRID),
        "tensorwise": lambda: recipes.Float8CurrentScaling(fp8_format=formats.HYBRID),
        "blockwise": lambda: recipes.Float8BlockScaling(fp8_format=formats.E4M3),
        "mxfp8": lambda: recipes.MXFP8BlockScaling(fp8_format=formats.E4M3),
    }[recipe]()
    # In a forward pass's order: input, weight, output.
    quantizer = RecipeState.create(scaling, mode="forward", num_quantizers=3).make_quantizers()[1]
    if recipe in ("delayed", "tensorwise"):
        quantizer.force_pow_2_scales = scaling.fp8_quant_fwd_weight.power_2_scale
        quantizer.amax_epsilon = scaling.fp8_quant_fwd_weight.amax_epsilon
    quantizer.set_usage(rowwise=True, columnwise=True)  # forward pass and input gradient read it along different axes
    quantizer.internal = False
    return quantizer


def stored_tensors(parameter: Tensor) -> list[Tensor]:
    """The plain tensors in memory behind a parameter: itself, or the bytes of one that is quantised."""
    parts = getattr(parameter, "get_data_tensors", None)
    if parts is None:
        return [parameter]
    found = parts()
    return [part for part in (found if isinstance(found, tuple | list) else [found]) if part is not None]
