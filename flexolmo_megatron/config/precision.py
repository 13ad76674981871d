"""The part of a run's configuration that is about number formats below bf16."""

from dataclasses import dataclass

from flexolmo_megatron.errors import FlexOlmoError, nearest

FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
"""Megatron's names (``--fp8-recipe``); what each needs of the chip is in ``model/fp8.py``."""


@dataclass
class Fp8Config:
    """FP8 matrix products in attention's projections and FFNs (Transformer Engine, Ada or newer)."""

    recipe: str | None = None
    """How tensors are scaled: delayed, tensorwise (current scaling), blockwise or mxfp8; by default no FP8. Delayed
    scaling's past is not part of checkpoints, so that with it a resumed run is not bitwise the unbroken one."""
    drop_frozen: bool = False
    """Keep the weights that do not train in FP8 only, which frees their bf16 copies (2 bytes per weight)."""

    def validate(self, bf16: bool) -> None:
        """Check what can be checked without the chip.

        Args:
            bf16: whether the run computes in bf16 elsewhere.

        Raises:
            FlexOlmoError: an unknown recipe, FP8 without bf16, or drop_frozen without FP8.
        """
        if self.recipe is None:
            if self.drop_frozen:
                raise FlexOlmoError("fp8.drop_frozen = true: expected fp8.recipe with it")
            return
        if self.recipe not in FP8_RECIPES:
            raise FlexOlmoError(
                f"fp8.recipe = {self.recipe!r}: expected one of {', '.join(FP8_RECIPES)}"
                f"{nearest(self.recipe, FP8_RECIPES)}"
            )
        if not bf16:
            raise FlexOlmoError(f"fp8.recipe = {self.recipe}: expected bf16 = true with it")
