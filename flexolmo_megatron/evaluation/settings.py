"""Settings that are kept beside results, so that a later start goes on with them only where it would find the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError


def check_same_settings(folder: Path, what: str, before: Any, now: Mapping[str, Any]) -> None:
    """Refuse to go on in ``folder`` with other settings than it was begun with.

    Args:
        folder: of the results.
        what: it holds, as in "an audit".
        before: settings that were kept there, of JSON.
        now: those of this start; under ``files``, what tells the models' files from others.

    Raises:
        FlexOlmoError: they differ; the first difference is named.
    """
    for name, value in json.loads(json.dumps(now)).items():
        earlier = before.get(name) if isinstance(before, dict) else None
        if earlier == value:
            continue
        if name == "files":
            raise FlexOlmoError(f"{folder} holds {what} of models whose files have changed since: name a new "
                                "directory, or remove this one")
        name, earlier, value = _difference(name, earlier, value)
        raise FlexOlmoError(f"{folder} holds {what} with {name} = {earlier}, and this one has {value}: name a new "
                            "directory, or remove this one")


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first of the options in ``before`` and ``now`` that differs, dotted, and its two values."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return name, before, now
    if before.keys() != now.keys():  # models, corpora: which there are
        return name, ", ".join(before), ", ".join(now)
    key = next(key for key in now if before[key] != now[key])
    return _difference(f"{name}.{key}", before[key], now[key])
