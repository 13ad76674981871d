"""All methods of the comparison, by family: each family is a function in a small module."""

from collections.abc import Callable, Sequence

from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.evaluation.methods import btm, btx, flexolmo, prompt_routing, single_models, soup
from flexolmo_megatron.evaluation.methods.base import Method, Models, Settings

FAMILIES: dict[str, Callable[[Models, Settings], list[Method]]] = {
    "public": single_models.public,
    "dense": single_models.dense,
    "soup": soup.soup,
    "btm": btm.btm,
    "prompt routing": prompt_routing.prompt_routing,
    "btx": btx.btx,
    "unrestricted": single_models.unrestricted,
    "flexolmo": flexolmo.flexolmo,
    "ablations": flexolmo.ablations,
}
"""Each returns its methods for the models that there are: none where those that it needs are missing."""


def build_methods(models: Models, settings: Settings | None = None,
                  families: Sequence[str] | None = None) -> list[Method]:
    """Return the methods of some families (by default all), in the order of the table.

    Raises:
        FlexOlmoError: an unknown family, or what a family raises.
    """
    chosen = list(FAMILIES) if families is None else families
    for family in chosen:
        if family not in FAMILIES:
            raise FlexOlmoError(f"unknown family of methods {family!r}{nearest(family, FAMILIES)}: expected some of "
                                f"{', '.join(FAMILIES)}")
    return [method for family, make in FAMILIES.items() if family in chosen
            for method in make(models, settings or Settings())]
