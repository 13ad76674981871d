"""Reading a run's configuration: defaults, then a preset, then YAML files, then dotted overrides."""

from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from flexolmo_megatron.errors import FlexOlmoError, nearest

Schema = TypeVar("Schema")


def preset_names() -> list[str]:
    """Names that ``--preset`` takes."""
    return sorted(
        path.name.removesuffix(".yaml") for path in files("flexolmo_megatron.config").joinpath("presets").iterdir()
    )


def load_config(
    schema: type[Schema], *, preset: str | None = None, paths: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Schema:
    """Build an instance of ``schema``, later sources overriding earlier ones.

    Args:
        schema: a dataclass with defaults.
        preset: name of a file in ``config/presets``.
        paths: YAML files.
        overrides: ``dotted.key=value`` strings, see ``parse_override``.

    Raises:
        FlexOlmoError: an unknown key (the nearest valid one is offered), a value of a wrong type, a required value
            that no source gives, or a file that cannot be read.
    """
    config = OmegaConf.structured(schema)
    if preset is not None:
        if preset not in preset_names():
            raise FlexOlmoError(
                f"unknown preset {preset!r}{nearest(preset, preset_names())}; there are {', '.join(preset_names())}"
            )
        text = files("flexolmo_megatron.config").joinpath("presets", f"{preset}.yaml").read_text()
        config = _merge(config, OmegaConf.create(text), f"preset {preset}")
    for path in paths:
        config = _merge(config, read_yaml(path), path)
    for override in overrides:
        config = _merge(config, parse_override(schema, override), "the command line")
    try:
        return OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise FlexOlmoError(
            f"{error.full_key} has no value; set it in a YAML file or with {error.full_key}=…"
        ) from None
    except OmegaConfBaseException as error:  # a reference ${…} to nothing
        raise FlexOlmoError(reason("the options", error)) from None


def read_yaml(path: str, what: str = "a YAML file") -> DictConfig:
    """Read the options of a YAML file, unchecked.

    Args:
        path: of the file.
        what: is expected there, for the error.

    Raises:
        FlexOlmoError: there is no such file, it is not YAML, or it is no mapping.
    """
    if not Path(path).is_file():
        raise FlexOlmoError(f"{path} does not exist; expected {what}")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml raises a family of errors that share no base with OmegaConf's
        raise FlexOlmoError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise FlexOlmoError(f"{path}: expected a mapping of options at the top")
    return loaded


def parse_override(schema: type, override: str) -> DictConfig:
    """Read one ``dotted.key=value``.

    Where ``schema`` has text at the key, the value is taken as it stands: 007, no, "a #b" and quotation marks are what
    they are, so that scripts need to quote for the shell alone. Only null, where no value is allowed, means none. All
    other values are YAML.

    Raises:
        FlexOlmoError: there is no key or no ``=``, or the value is not YAML.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise FlexOlmoError(f"{override!r}: expected an override of the form key=value")
    hint: Any = schema
    for name in key.split("."):
        hint = get_type_hints(hint).get(name) if is_dataclass(hint) else None
    if value and (hint is str or (hint == str | None and value != "null")):
        parsed = OmegaConf.create()
        OmegaConf.update(parsed, key, value)
        return parsed
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # yaml raises a family of errors that share no base with OmegaConf's
        raise FlexOlmoError(f"{override!r} is not a valid override: {' '.join(str(error).split())}") from error


def _merge(config: DictConfig, values: DictConfig, where: str) -> DictConfig:
    try:
        _reject_unknown(config, values, where, "")
    except OmegaConfBaseException as error:
        raise FlexOlmoError(reason(where, error)) from None
    return merge(config, values, where)


def merge(config: DictConfig, values: DictConfig, where: str) -> DictConfig:
    """Put ``values`` over ``config``, which is not to be used again.

    Raises:
        FlexOlmoError: a value of a wrong type; the message begins with ``where`` and the option's dotted name.
    """
    try:
        return OmegaConf.unsafe_merge(config, values)  # no copy
    except OmegaConfBaseException as error:
        misfit = _no_list(values, error) if error.full_key else _misfit(config, OmegaConf.to_container(values), ())
        raise FlexOlmoError(": ".join(filter(None, [where, misfit])) if misfit else reason(where, error)) from None


def _no_list(values: DictConfig, error: OmegaConfBaseException) -> str:
    """Say how a list is written, where OmegaConf speaks of its own types; empty for other errors."""
    if "is not a ListConfig" not in str(error):
        return ""
    value = OmegaConf.select(values, error.full_key)
    return f"{error.full_key} = {value!r}: expected a list, in brackets: {[value]}"


def _misfit(config: DictConfig, values: dict[str, Any], path: tuple[str, ...]) -> str:
    """Which option below ``path`` is no mapping, or no list, where ``config`` has one; OmegaConf does not name it."""
    for key, value in values.items():
        place = (*path, key)
        if not _fits(config, place, value):
            if isinstance(value, dict) and _fits(config, place, {}):
                return _misfit(config, value, place)
            expected = "a list" if isinstance(value, dict) else "a mapping of options"
            return f"{'.'.join(map(str, place))} = {value!r}: expected {expected}"
    return ""


def _fits(config: DictConfig, place: tuple[str, ...], value: Any) -> bool:
    try:
        OmegaConf.merge(config, reduce(lambda inner, name: {name: inner}, reversed(place), value))
    except OmegaConfBaseException:
        return False
    return True


def reason(where: str, error: OmegaConfBaseException) -> str:
    """What OmegaConf refuses, in one line: where, the option's dotted name, and why."""
    return ": ".join(filter(None, [where, error.full_key, str(error.msg or error).splitlines()[0]]))


def _reject_unknown(config: Any, values: DictConfig, where: str, prefix: str) -> None:
    """Raise for the first key of ``values`` that ``config`` does not have, offering the nearest one."""
    if OmegaConf.get_type(config) is dict:  # a mapping of names that the user chooses
        return
    for key in values:
        full_key = f"{prefix}{key}"
        try:
            known = OmegaConf.is_missing(config, key) or config[key] is not None or key in config
        except (ConfigKeyError, ConfigAttributeError):
            known = False
        if not known:
            close = nearest(str(key), map(str, config)) or nearest(str(key), _all_keys(config, ""))
            raise FlexOlmoError(f"{where}: unknown option {full_key!r}{close}")
        inner = None if OmegaConf.is_missing(config, key) else config[key]
        if isinstance(inner, DictConfig) and isinstance(values.get(key), DictConfig):
            _reject_unknown(inner, values[key], where, f"{full_key}.")


def _all_keys(config: DictConfig, prefix: str) -> list[str]:
    keys = []
    for key in config:
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            keys += _all_keys(config[key], f"{prefix}{key}.")
    return keys


def save_config(config: Any, path: Path) -> None:
    """Write a configuration as YAML, so that ``paths=[path]`` gives it again."""
    from flexolmo_megatron.files import atomic_file

    with atomic_file(path, "w") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.structured(config)))
