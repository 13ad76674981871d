"""A recipe: the YAML file that says what a set is made of, how it is filtered, and what is known about it.

::

    about: what the set is
    facts: where the statements come from
    sources:
      NAME:
        what: what it is
        where: where to get it
        licence: its licence
        before: what had been done to it
        text_key: key or column of the text (default: that of the command line)
        filters: [...]
    filters: [...]      # of all sources, after their own

A filter is a mapping of its name to its options, ``{gopher_quality: {min_doc_words: 20}}``, or its name alone.
"""

import re
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flexolmo_megatron.config.load import read_yaml, reason
from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.mix.filters import FilterSpec, parse_filter

NOT_STATED = "not stated"
_SOURCE = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Source:
    """One source of a recipe."""

    filters: list[FilterSpec]
    """Its own and the recipe's, in the order in which they are applied."""
    what: str = NOT_STATED
    where: str = NOT_STATED
    licence: str = NOT_STATED
    before: str = NOT_STATED
    text_key: str | None = None


@dataclass(frozen=True)
class Recipe:
    """What a YAML file says."""

    name: str
    about: str
    facts: str
    sources: dict[str, Source]
    text: str
    """Of the file."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with this package."""
    folder = files("flexolmo_megatron.mix").joinpath("recipes")
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """Read one of ``recipe_names()``, or a YAML file.

    Raises:
        FlexOlmoError: there is no such recipe, or it has an unknown key or filter, or a value of a wrong type.
    """
    path = Path(name)
    if name in recipe_names():
        path = Path(str(files("flexolmo_megatron.mix").joinpath("recipes", f"{name}.yaml")))
    elif path.suffix not in (".yaml", ".yml"):
        raise FlexOlmoError(f"unknown recipe {name!r}{nearest(name, recipe_names())}; expected a YAML file, or one of "
                            f"{', '.join(recipe_names())}")
    where = f"recipe {name}"
    try:
        values: Any = OmegaConf.to_container(read_yaml(str(path), "a recipe"), resolve=True)
    except OmegaConfBaseException as error:  # a reference ${…} to nothing
        raise FlexOlmoError(reason(where, error)) from None
    _check(where, values, {"about": str, "facts": str, "sources": dict, "filters": list})
    if not values.get("sources"):
        raise FlexOlmoError(f"{where} has no sources")
    common = values.get("filters") or []
    known: dict[str, type] = {field.name: str for field in fields(Source)} | {"filters": list}
    sources = {}
    for source, content in values["sources"].items():
        place = f"{where}: source {source}"
        if not _SOURCE.fullmatch(str(source)):
            raise FlexOlmoError(f"{place}: expected a name of letters, digits, '_', '-' and '.', as it begins the "
                                "names of files")
        content = content or {}
        _check(place, content, known)
        specs = [parse_filter(place, value) for value in [*(content.pop("filters", None) or []), *common]]
        sources[str(source)] = Source(specs, **content)
    return Recipe(path.stem, values.get("about") or NOT_STATED, values.get("facts") or NOT_STATED, sources,
                  path.read_text(encoding="utf-8"))


def _check(where: str, values: Any, known: dict[str, type]) -> None:
    nouns = {str: "text", dict: "a mapping", list: "a list"}
    if not isinstance(values, dict):
        raise FlexOlmoError(f"{where}: expected a mapping, got {values!r}")
    for key, value in values.items():
        if key not in known:
            raise FlexOlmoError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
        if value is not None and not isinstance(value, known[key]):
            raise FlexOlmoError(f"{where}: {key} = {value!r}: expected {nouns[known[key]]}")
