"""``manifest.json`` of an expert package: its fields, and strict reading of a file that a stranger wrote.

Free text (owner, licence, contact) is carried and shown, never interpreted. Nothing here looks at tensors.
"""

import json
import re
import unicodedata
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flexolmo_megatron.config.card import PUBLIC
from flexolmo_megatron.errors import FlexOlmoError, nearest

MANIFEST_FILE = "manifest.json"
TENSOR_FILE = "expert.safetensors"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 64 * 1024
MAX_TEXT = 4096
"""Longest free text, in characters."""
MAX_SIZE = 2**31
"""Largest number of layers, hidden size or FFN size: keeps every product of them within 64 bits."""
DTYPES = ("BF16", "F16", "F32")
"""Of the expert's weights, as safetensors spells them."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Architecture:
    """Sizes of the expert; all but ffn_hidden_size must equal the anchor's."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Inner width of the expert; at most the anchor's."""
    dtype: str
    """One of ``DTYPES``."""


ROUTER_FIELDS = {"embedder": str, "documents": int}
"""How the router row was made: name of the embedder, number of documents whose embeddings were averaged."""
TRAINING_FIELDS = {"tokens": int, "steps": int, "lr": float, "seed": int, "dp": dict}
"""Summary of the owner's run: tokens and optimizer steps, peak learning rate, seed, differential privacy if any."""
DP_FIELDS = {"epsilon": float, "delta": float, "noise_multiplier": float, "max_grad_norm": float}


@dataclass(frozen=True)
class Manifest:
    """What an owner says about an expert. Building one validates it; all keys of router and training are optional."""

    name: str
    """What --experts and --exclude will take."""
    anchor_digest: str
    """``exchange/digest.py`` of the anchor that it was trained against."""
    architecture: Architecture
    sha256: str
    """Of the tensor file, all of its bytes."""
    owner: str = ""
    licence: str = ""
    contact: str = ""
    router: dict[str, Any] = field(default_factory=dict)
    """Keys: ``ROUTER_FIELDS``."""
    training: dict[str, Any] = field(default_factory=dict)
    """Keys: ``TRAINING_FIELDS``."""

    def __post_init__(self) -> None:
        check_expert_name(self.name)
        for key in ("anchor_digest", "sha256"):
            value = getattr(self, key)
            if not isinstance(value, str) or not _HEX.fullmatch(value):
                raise FlexOlmoError(f"{key} = {_shown(value)}: expected 64 lower-case hexadecimal digits")
        for key in ("owner", "licence", "contact"):
            _check_text(key, getattr(self, key))
        for key in ("num_layers", "hidden_size", "ffn_hidden_size"):
            _check_number(f"architecture.{key}", getattr(self.architecture, key), int, smallest=1, largest=MAX_SIZE)
        if self.architecture.dtype not in DTYPES:
            raise FlexOlmoError(f"architecture.dtype = {_shown(self.architecture.dtype)}: expected one of "
                                f"{', '.join(DTYPES)}")
        _check_fields("router", self.router, ROUTER_FIELDS)
        _check_fields("training", self.training, TRAINING_FIELDS)
        if "dp" in self.training:
            _check_fields("training.dp", self.training["dp"], DP_FIELDS)

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}


def check_expert_name(name: Any) -> None:
    """Refuse a name that could not be used in a path, in a list with commas or on a terminal.

    Raises:
        FlexOlmoError: too long, other characters, "..", or the reserved name of the anchor's own expert.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise FlexOlmoError(f"expert name {_shown(name)}: expected 1 to 64 of A-Z a-z 0-9 . _ -, starting with a "
                            "letter or digit and without '..'")
    if name.lower() == PUBLIC:
        raise FlexOlmoError(f"expert name {name!r} is reserved for the anchor's own expert; choose another")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse the bytes of a ``manifest.json``; ``where`` names the file in an error.

    Raises:
        FlexOlmoError: anything but a complete, well-formed manifest of this format version.
    """
    try:
        return _parse(data)
    except FlexOlmoError as error:
        raise FlexOlmoError(f"{where}: {error}") from None


def _parse(data: bytes) -> Manifest:
    if len(data) > MAX_MANIFEST_BYTES:
        raise FlexOlmoError(f"larger than {MAX_MANIFEST_BYTES} bytes, the limit for a manifest")
    values = parse_strict_json(data)
    if not isinstance(values, dict):
        raise FlexOlmoError(f"expected a JSON object, got {type(values).__name__}")
    version = values.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise FlexOlmoError(f"format_version = {_shown(version)}: this program reads version {FORMAT_VERSION}")
    _check_keys("manifest", values, Manifest)
    _check_keys("architecture", values["architecture"], Architecture)
    return Manifest(**{**values, "architecture": Architecture(**values["architecture"])})


def parse_strict_json(data: bytes) -> Any:
    """``json.loads`` without its extensions: no duplicate keys, no NaN or Infinity, UTF-8 only.

    Raises:
        FlexOlmoError: ``data`` is not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise FlexOlmoError(f"key {_shown(next(key for key in keys if keys.count(key) > 1))} appears twice")
        return result

    def refuse(constant: str) -> None:
        raise FlexOlmoError(f"{constant} is not a JSON number")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise FlexOlmoError("JSON nested too deeply") from None
    except FlexOlmoError:
        raise
    except ValueError as error:  # also bad UTF-8 and integers of thousands of digits
        raise FlexOlmoError(f"not valid JSON: {error}") from None


def printable(text: str) -> str:
    """Return free text with everything that could steer a terminal replaced by its escape."""
    return "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else c.encode("unicode_escape").decode()
                   for c in text)


def _shown(value: Any) -> str:
    """``repr`` of a stranger's value, in at most 80 ASCII characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_keys(what: str, values: Any, cls: type) -> None:
    if not isinstance(values, dict):
        raise FlexOlmoError(f"{what}: expected a JSON object, got {_shown(values)}")
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise FlexOlmoError(f"unknown {what} field {_shown(key)}{nearest(key, known)}")
    for key in known:
        if key not in values:
            raise FlexOlmoError(f"{what} field {key!r} is missing")


def _check_fields(what: str, values: Any, known: dict[str, type]) -> None:
    if not isinstance(values, dict):
        raise FlexOlmoError(f"{what}: expected a JSON object, got {_shown(values)}")
    for key, value in values.items():
        if key not in known:
            raise FlexOlmoError(f"unknown {what} field {_shown(key)}{nearest(str(key), known)}")
        if known[key] is str:
            _check_text(f"{what}.{key}", value)
        elif known[key] is not dict:
            _check_number(f"{what}.{key}", value, known[key], smallest=0, largest=2**63 - 1)


def _check_text(what: str, value: Any) -> None:
    if not isinstance(value, str):
        raise FlexOlmoError(f"{what} = {_shown(value)}: expected text")
    if len(value) > MAX_TEXT:
        raise FlexOlmoError(f"{what} has {len(value)} characters: expected at most {MAX_TEXT}")
    bad = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"), None)
    if bad is not None:
        raise FlexOlmoError(f"{what} holds the control character {ascii(bad)}: expected plain text")


def _check_number(what: str, value: Any, kind: type, *, smallest: int, largest: int) -> None:
    accepted = (int,) if kind is int else (int, float)
    if type(value) not in accepted or not smallest <= value <= largest:  # false for NaN and infinity, too
        noun = "a whole number" if kind is int else "a number"
        raise FlexOlmoError(f"{what} = {_shown(value)}: expected {noun} from {smallest} to {largest}")
