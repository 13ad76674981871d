"""FP8 recipes of Transformer Engine by name: what each needs of the chip and of the sizes, and its Megatron settings.

Checked here, before any model is built, because Transformer Engine itself only asserts in the first forward pass. The
limits are those of transformer_engine/pytorch/quantization.py and utils.py, v2.10 and v2.11.

Quantised are the matrix products of attention's projections and of the FFNs, inside Megatron's decoder layers. The
embedding, norms, core attention, the router (plain torch in fp32), the final norm and the output layer (Megatron's own,
outside the layers' FP8 context) stay in bf16 or fp32.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.errors import FlexOlmoError, nearest

ENGINE = SpecifierSet(">=2.10,<2.12")
"""Versions of Transformer Engine that megatron-core 0.16.1 is made for (its package metadata), but not 2.9: with that
one, Megatron's router takes Transformer Engine's matrix product, which rounds fp32 to TF32."""
INSTALL = f"pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]{ENGINE}'"


@dataclass(frozen=True)
class Recipe:
    """One way of scaling FP8 tensors."""

    format: str
    """Megatron's name of the number format: e4m3 everywhere, or hybrid (E5M2 for gradients)."""
    capability: tuple[int, int]
    """Lowest compute capability."""
    below: tuple[int, int] | None
    """First compute capability that is not supported any more; None for no limit."""
    cuda: str
    """Lowest CUDA version of torch and Transformer Engine."""
    multiple: int
    """Every dimension of a matrix product is a multiple of this."""
    block: int
    """Both dimensions of what sequence parallelism gathers in FP8 are multiples of this."""


RECIPES = {
    # One scale per tensor, from the largest value of the past.
    "delayed": Recipe("hybrid", (8, 9), None, "12.1", 16, 16),
    # One scale per tensor, from its largest value now.
    "tensorwise": Recipe("hybrid", (8, 9), None, "12.1", 16, 16),
    # A scale per 1 x 128 activations and 128 x 128 weights.
    "blockwise": Recipe("e4m3", (9, 0), None, "12.9", 16, 128),
    # A power-of-two scale per 32 values, in hardware.
    "mxfp8": Recipe("e4m3", (10, 0), (12, 0), "12.8", 32, 32),
}
"""Under Megatron's names (``--fp8-recipe``)."""


@dataclass(frozen=True)
class Chip:
    """What this process computes on."""

    name: str
    """Empty where there is no CUDA device."""
    capability: tuple[int, int]
    cuda: str
    """CUDA version that torch was built for."""
    engine: str | None
    """Version of Transformer Engine; None where it is missing."""


def this_chip() -> Chip:
    """Describe the current CUDA device and the software for it."""
    try:
        engine = version("transformer-engine")
    except PackageNotFoundError:
        engine = None
    if not torch.cuda.is_available():
        return Chip("", (0, 0), "", engine)
    return Chip(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.version.cuda or "0", engine)


def check_engine(chip: Chip, what: str) -> None:
    """Check that Transformer Engine can run.

    Args:
        chip: from ``this_chip``.
        what: needs it; begins the message.

    Raises:
        FlexOlmoError: there is no CUDA device, or Transformer Engine is missing or of another version.
    """
    if not chip.name:
        raise FlexOlmoError(f"{what} needs an NVIDIA GPU: this machine has no CUDA device")
    if chip.engine is None:
        raise FlexOlmoError(f"{what} needs Transformer Engine, which is not installed; run: {INSTALL}")
    if not ENGINE.contains(chip.engine, prereleases=True):
        raise FlexOlmoError(
            f"{what} needs Transformer Engine {ENGINE}, for which megatron-core 0.16.1 is made: {chip.engine} is "
            f"installed; run: {INSTALL}"
        )


def check_recipe(name: str, chip: Chip) -> None:
    """Check that a chip can run an FP8 recipe.

    Args:
        name: of the recipe; a key of ``RECIPES``.
        chip: from ``this_chip``.

    Raises:
        FlexOlmoError: the name is unknown, or the chip, its CUDA or Transformer Engine do not support it.
    """
    if name not in RECIPES:
        raise FlexOlmoError(f"fp8.recipe = {name!r}: expected one of {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    recipe, what = RECIPES[name], f"fp8.recipe = {name}"
    low = ".".join(map(str, recipe.capability))
    upper = "" if recipe.below is None else f" and below {'.'.join(map(str, recipe.below))}"
    needs = f"{what} needs compute capability {low} or higher{upper}"
    if not chip.name:
        raise FlexOlmoError(f"{needs}: this machine has no CUDA device")
    if chip.capability < recipe.capability or (recipe.below is not None and chip.capability >= recipe.below):
        others = [other for other, values in RECIPES.items() if _runs_on(values, chip)]
        instead = f"use {' or '.join(others)}, or bf16" if others else "use bf16"
        raise FlexOlmoError(f"{needs}: {chip.name} has {'.'.join(map(str, chip.capability))}; {instead}")
    if Version(chip.cuda) < Version(recipe.cuda):
        raise FlexOlmoError(f"{what} needs CUDA {recipe.cuda} or newer: torch was built for CUDA {chip.cuda}")
    check_engine(chip, what)


def _runs_on(recipe: Recipe, chip: Chip) -> bool:
    fits = chip.capability >= recipe.capability and (recipe.below is None or chip.capability < recipe.below)
    return fits and Version(chip.cuda) >= Version(recipe.cuda)


def check_sizes(
    recipe: str,
    model: ModelConfig,
    tokens: int,
    tensor_parallel: int = 1,
    anchor_ffn: int = 0,
    ffn_parallel: int | None = None,
    token_parallel: int = 1,
    sequence_parallel: bool = False,
) -> None:
    """Check that every matrix product of the layers has dimensions that FP8 units can take.

    Args:
        recipe: name; a key of ``RECIPES``.
        model: the architecture.
        tokens: in a microbatch.
        tensor_parallel: processes that share each matrix.
        anchor_ffn: of a pair, inner width of the anchor's FFN where it is another than the owner's.
        ffn_parallel: processes that share each FFN matrix; None for as many as ``tensor_parallel``.
        token_parallel: processes that share the tokens of each sequence (context and sequence parallelism).
        sequence_parallel: whether sequence parallelism is on.

    Raises:
        FlexOlmoError: a dimension is not a multiple of what the recipe needs.
    """
    multiple, head = RECIPES[recipe].multiple, model.head_dim
    gathered = RECIPES[recipe].block if sequence_parallel else multiple
    sizes = {
        "model.hidden_size": (model.hidden_size, 1, gathered),
        "model.ffn_hidden_size": (model.ffn_hidden_size, ffn_parallel or tensor_parallel, multiple),
        "the anchor's ffn_hidden_size": (anchor_ffn, tensor_parallel, multiple),
        "model.num_attention_heads * head_dim": (model.num_attention_heads * head, tensor_parallel, multiple),
        "query, key and value projections together": (
            (model.num_attention_heads + 2 * model.num_query_groups) * head,
            tensor_parallel,
            multiple,
        ),
        "micro_batch_size * data.seq_length": (tokens, token_parallel, gathered),
    }
    for name, (size, split, needed) in sizes.items():
        if size % (needed * split):
            shared = f" / {split} processes" if split > 1 else ""
            why = ", which parallel.sequence needs with this recipe" if needed > multiple else ""
            raise FlexOlmoError(f"fp8.recipe = {recipe}: {name} = {size}{shared} is not a multiple of {needed}{why}")


def fp8_settings(recipe: str | None) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig for a recipe; none of them for bf16.

    fp8_param stays off: trained weights keep a bf16 copy, from which they are quantised once per step. Frozen weights
    are seen to by ``model/engine.py``.
    """
    if recipe is None:
        return {}
    return {"fp8": RECIPES[recipe].format, "fp8_recipe": recipe}
