"""The filters that a recipe may name, with their options: those of datatrove, and some on a document's own values.

An option that is not given has the filter's own default, which for datatrove's is that of its version.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_origin

from flexolmo_megatron.errors import FlexOlmoError, first_line, nearest

_UNSEEN = ("self", "exclusion_writer", "batch_size")
"""Parameters of filters that are no options."""

_OF_WORDS = ("gopher_quality", "gopher_repetition", "c4_quality", "fineweb_quality")
"""Filters that split texts of a ``language`` into words."""

_MODELS = {"fasttext": "model_url", "language": "model"}
"""Filters with a model, and the option that names its file."""

_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"), int: ((int, float), "a number"), float: ((int, float), "a number"),
    str: ((str,), "text"), tuple: ((list,), "a list"), list: ((list,), "a list"),
}
"""By the type of an option's default, or else of its annotation: what a recipe may give, and what an error calls it."""

FILTERS = {
    "gopher_quality": ("datatrove.pipeline.filters", "GopherQualityFilter"),
    "gopher_repetition": ("datatrove.pipeline.filters", "GopherRepetitionFilter"),
    "c4_quality": ("datatrove.pipeline.filters", "C4QualityFilter"),
    "fineweb_quality": ("datatrove.pipeline.filters", "FineWebQualityFilter"),
    "regex": ("datatrove.pipeline.filters", "RegexFilter"),
    "fasttext": ("flexolmo_megatron.mix.steps", "FastText"),
    "url": ("flexolmo_megatron.mix.steps", "Url"),
    "language": ("flexolmo_megatron.mix.steps", "Language"),
    "label": ("flexolmo_megatron.mix.steps", "Label"),
    "number": ("flexolmo_megatron.mix.steps", "Number"),
    "length": ("flexolmo_megatron.mix.steps", "Length"),
    "frequent_words": ("flexolmo_megatron.mix.steps", "FrequentWords"),
}
"""Module and class of each."""


@dataclass(frozen=True)
class FilterSpec:
    """A filter of a recipe."""

    name: str
    options: dict[str, Any]

    @property
    def keys(self) -> list[str]:
        """Values of a document, beside its text, that it looks at."""
        if self.name == "url":
            return ["url"]
        return [self.options["key"]] if self.name in ("label", "number") else []

    @property
    def model(self) -> Path | None:
        """File of its model, if it has one."""
        return Path(self.options[_MODELS[self.name]]) if self.name in _MODELS else None

    def build(self) -> Any:
        """The step of a pipeline.

        Raises:
            FlexOlmoError: what the filter needs is not installed or not there, or its options contradict each other.
        """
        try:
            step = _class(self.name)(**self.options)
            if self.name in _OF_WORDS:
                from datatrove.utils.word_tokenizers import load_word_tokenizer

                load_word_tokenizer(step.language)  # whether there is one, rather than at the first document
        except ImportError as error:
            raise FlexOlmoError(f"the filter {self.name} lacks a package: {first_line(error)}") from error
        except Exception as error:  # whatever a filter raises for an option that it cannot use
            raise FlexOlmoError(f"the filter {self.name}: {first_line(error)}") from error
        step.name = self.name
        return step


def parse_filter(where: str, value: Any) -> FilterSpec:
    """Check a filter of a recipe: its name, the names of its options, and the kinds of their values.

    Raises:
        FlexOlmoError: one of them is wrong.
    """
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, dict) or len(value) != 1:
        raise FlexOlmoError(f"{where}: filter {value!r}: expected a name, or a mapping of one name to its options")
    name, options = next(iter(value.items()))
    if name not in FILTERS:
        raise FlexOlmoError(f"{where}: unknown filter {name!r}{nearest(str(name), FILTERS)}; there are "
                            f"{', '.join(FILTERS)}")
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise FlexOlmoError(f"{where}: filter {name}: expected a mapping of options, got {options!r}")
    parameters = {key: parameter for key, parameter in signature(_class(name).__init__).parameters.items()
                  if key not in _UNSEEN}
    for key, given in options.items():
        if key not in parameters:
            raise FlexOlmoError(f"{where}: filter {name}: unknown option {key!r}{nearest(str(key), parameters)}")
        default, annotation = parameters[key].default, parameters[key].annotation
        kind = (get_origin(annotation) or annotation) if default in (None, Parameter.empty) else type(default)
        if given is None or kind not in _KINDS:
            continue
        accepted, noun = _KINDS[kind]
        if not isinstance(given, accepted) or isinstance(given, bool) != (kind is bool):
            raise FlexOlmoError(f"{where}: filter {name}: {key} = {given!r}: expected {noun}")
    for key, parameter in parameters.items():
        if parameter.default is Parameter.empty and options.get(key) is None:
            raise FlexOlmoError(f"{where}: filter {name}: the option {key!r} is missing")
    return FilterSpec(name, options)


def _class(name: str) -> Callable[..., Any]:
    from importlib import import_module

    module, attribute = FILTERS[name]
    return getattr(import_module(module), attribute)
