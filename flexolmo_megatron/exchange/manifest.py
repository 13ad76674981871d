"""``manifest.json`` of an expert package: its fields, and strict reading of a file that a stranger wrote.

Free text (owner, licence, contact) is carried and shown, never interpreted. Nothing here looks at tensors.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from flexolmo_megatron.config.card import ROUTER_FIELDS, check_expert_name
from flexolmo_megatron.config.model import MAX_ROUTER_WINDOW, UNHASHED
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.untrusted import (
    check_digest,
    check_fields,
    check_keys,
    check_number,
    check_text,
    parse_strict_json,
    shown,
)

MANIFEST_FILE = "manifest.json"
TENSOR_FILE = "expert.safetensors"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 64 * 1024
MAX_SIZE = 2**31
"""Largest number of layers, hidden size or FFN size: keeps every product of them within 64 bits."""
DTYPES = ("BF16", "F16", "F32")
"""Of the expert's weights, as safetensors spells them."""


@dataclass(frozen=True)
class Architecture:
    """Sizes and constants of the expert; all but ffn_hidden_size must equal the anchor's."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Inner width of the expert; at most the anchor's."""
    dtype: str
    """One of ``DTYPES``."""
    router_window: int = 1
    """Positions over which routing logits were averaged in training; all experts of a model have the same."""
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    rotary_base: float | None = None
    layernorm_epsilon: float | None = None
    """These four change what the anchor's tensors compute, and its digest does not show them; None: not said."""


_UNSAID = {field.name: field.default for field in fields(Architecture) if field.default is not MISSING}
"""What a manifest may leave out."""
_ARCHITECTURE = {**dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                                  "num_query_groups"), (int, 1, MAX_SIZE)),
                 "router_window": (int, 1, MAX_ROUTER_WINDOW),
                 **dict.fromkeys(("rotary_base", "layernorm_epsilon"), (float, 0, MAX_SIZE))}
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
            check_digest(key, getattr(self, key))
        for key in ("owner", "licence", "contact"):
            check_text(key, getattr(self, key))
        for key, (kind, smallest, largest) in _ARCHITECTURE.items():
            value = getattr(self.architecture, key)
            if value is not None or key not in UNHASHED:
                check_number(f"architecture.{key}", value, kind, smallest=smallest, largest=largest)
        if self.architecture.dtype not in DTYPES:
            raise FlexOlmoError(f"architecture.dtype = {shown(self.architecture.dtype)}: expected one of "
                                f"{', '.join(DTYPES)}")
        check_fields("router", self.router, ROUTER_FIELDS)
        check_fields("training", self.training, TRAINING_FIELDS)
        if "dp" in self.training:
            check_fields("training.dp", self.training["dp"], DP_FIELDS)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["architecture"] = {key: value for key, value in values["architecture"].items()
                                  if value != _UNSAID.get(key, MISSING)}
        return {"format_version": FORMAT_VERSION, **values}


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
        raise FlexOlmoError(f"format_version = {shown(version)}: this program reads version {FORMAT_VERSION}")
    check_keys("manifest", values, Manifest)
    if isinstance(values["architecture"], dict):
        values["architecture"] = _UNSAID | values["architecture"]
    check_keys("architecture", values["architecture"], Architecture)
    return Manifest(**{**values, "architecture": Architecture(**values["architecture"])})
