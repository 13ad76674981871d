"""``flexolmo.json``: the small file beside a checkpoint's tensors that says what they are and where they came from.

It lies in every Megatron checkpoint that this package writes and beside the ``config.json`` of every Hugging Face
directory that it exports (transformers ignores it; a directory without one gets numbered expert names).

It may come from a stranger, within a published anchor or a merged model: ``ModelCard.load`` checks every value.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from flexolmo_megatron.config.layout import ModelKind
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.files import write_json
from flexolmo_megatron.untrusted import check_digest, check_fields, check_number, check_text, parse_strict_json, shown

CARD_FILE = "flexolmo.json"
FORMAT_VERSION = 1
PUBLIC = "public"
"""Name of the anchor's own expert: always expert 0, and never excluded."""

MAX_CARD_BYTES = 16 * 1024 * 1024
"""Enough for a thousand experts with the longest texts."""
ROUTER_FIELDS = {"embedder": str, "reading": str, "documents": int, "centred": bool, "discriminant": bool}
"""How a router row was made: name of the embedder, how it reads documents, number of documents whose embeddings were
averaged, whether only their difference from the anchor's counted, and whether it began as a linear discriminant."""

TUNED_MODEL = "model"
"""Folder of a run of router tuning that holds its result, a whole model."""
UNTUNED = "untuned"
"""Name of the rows that a merged model had before its router was tuned: each comes from its own expert's package."""
TUNED = "tuned"
"""Name of the rows that were tuned with all experts."""
WITHOUT = "without-"
"""With an expert's name after it: name of the rows that were tuned without that expert and its owner's proxies."""

Kind = Literal["dense", "moe", "pair", "router"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SET_NAME = re.compile(rf"{UNTUNED}|{TUNED}|{WITHOUT}{_NAME.pattern}")
_WHAT = "the card of a FlexOlmo checkpoint"
_DTYPES = ("bfloat16", "float16", "float32")
_MAX_NUMBER = 2**31


@dataclass
class ExpertRecord:
    """One expert of a model and its provenance."""

    name: str
    """Unique within the model; what --experts and --exclude take."""
    package_sha256: str | None = None
    """Digest of the tensor file of the package that it came from; None for the anchor's own."""
    owner: str = ""
    """Free text from the package."""
    licence: str = ""
    """Free text from the package."""
    contact: str = ""
    """Free text from the package."""
    router: dict[str, Any] = field(default_factory=dict)
    """Some of ``ROUTER_FIELDS``."""


@dataclass
class RowSet:
    """A whole set of router rows and biases of a merged model, and on whom it depends beyond each row's own expert."""

    name: str
    """``UNTUNED``, ``TUNED``, or ``WITHOUT`` and an expert's name."""
    experts: list[str] = field(default_factory=list)
    """Owners' experts that were in the model when the rows were tuned: their weights have shaped all rows."""
    proxies: list[str] = field(default_factory=list)
    """Experts on whose owners' proxies the rows were tuned."""
    training: dict[str, Any] = field(default_factory=dict)
    """Summary of the tuning: tokens, steps, lr, seed."""

    def depends_on(self, names: Iterable[str]) -> bool:
        """Whether the data of one of these experts' owners has shaped rows other than that expert's own."""
        return not {*self.experts, *self.proxies}.isdisjoint(names)


@dataclass
class ModelCard:
    """What a checkpoint holds."""

    kind: Kind
    """dense: no experts. moe: FlexOlmo experts and router. pair: only what an owner trained; the rest is in the
    anchor. router: only rows and biases that were tuned; the rest is in the merged model."""
    model: ModelConfig
    """The architecture. For a pair: of the coupled model (num_experts = top_k = 2, ffn_hidden_size as the owner's
    expert)."""
    experts: list[ExpertRecord] = field(default_factory=list)
    """In the order of the router's rows; empty for a dense model."""
    tokenizer: dict[str, str] = field(default_factory=lambda: {"type": "byte"})
    """{"type": "byte"} or {"type": "huggingface", "path": name or folder}."""
    anchor_digest: str | None = None
    """Digest of the anchor that a pair or merged model belongs to; None where unknown."""
    anchor_path: str | None = None
    """Where the anchor was when a pair was trained; absolute. Only for a pair."""
    anchor_dtype: str | None = None
    """Type of that anchor's tensors, as "bfloat16": what a package is written in, whatever the run computed in."""
    training: dict[str, Any] = field(default_factory=dict)
    """Summary of the run: tokens, steps, lr, seed."""
    chosen_top_k: int | None = None
    """The top-k that somebody chose for a merged model, whatever number of experts it has at the moment; None where
    top-k follows from that number."""
    row_sets: list[RowSet] = field(default_factory=list)
    """Of a merged model with a tuned router: its sets of rows, the one among its tensors first, the others in
    ``convert/rows.py``'s file; one of them is ``UNTUNED``. Of kind router: the set that it holds. Otherwise empty."""
    merged_digest: str | None = None
    """Of kind router: digest of the merged model, with its untuned rows."""

    def __post_init__(self) -> None:
        expected = self.model.num_experts
        if self.kind == "dense" and expected:
            raise FlexOlmoError(f"a dense model with model.num_experts = {expected}: expected 0")
        if len(self.experts) != expected:
            raise FlexOlmoError(
                f"{len(self.experts)} expert names for model.num_experts = {expected}: expected one each"
            )
        names = [name.lower() for name in self.expert_names]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise FlexOlmoError(f"expert name {self.experts[number].name!r} appears twice: every expert of a model "
                                    "needs its own name, and upper and lower case count as the same")

    @property
    def expert_names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @property
    def model_kind(self) -> ModelKind:
        """Of the model that computes: router rows are part of a merged one."""
        return "moe" if self.kind == "router" else self.kind

    def save(self, directory: Path) -> None:
        """Write the card into ``directory``."""
        write_json(directory / CARD_FILE, {"format_version": FORMAT_VERSION, **asdict(self)})

    def to_json(self) -> str:
        """The card as text, for places that keep no file; ``from_json`` reads it."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "ModelCard":
        """Read what ``to_json`` made.

        Raises:
            FlexOlmoError: it is broken, of another format version, or one of its values is impossible.
        """
        return _parse(text.encode())

    @classmethod
    def load(cls, directory: Path) -> "ModelCard":
        """Read the card of ``directory``.

        Raises:
            FlexOlmoError: it is missing, broken, of another format version, or one of its values is impossible.
        """
        path = Path(directory) / CARD_FILE
        data = _read(path)
        try:
            return _parse(data)
        except FlexOlmoError as error:
            raise FlexOlmoError(f"{path}: {error}") from None


def numbered_experts(count: int) -> list[ExpertRecord]:
    """Records of experts without names of their own: public, expert_1, expert_2 and so on."""
    return [ExpertRecord(PUBLIC if number == 0 else f"expert_{number}") for number in range(count)]


def check_expert_name(name: Any) -> None:
    """Refuse a name that could not be used in a path, in a list with commas or on a terminal.

    Raises:
        FlexOlmoError: too long, other characters, "..", or the reserved name of the anchor's own expert.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise FlexOlmoError(f"expert name {shown(name)}: expected 1 to 64 of A-Z a-z 0-9 . _ -, starting with a "
                            "letter or digit and without '..'")
    if name.lower() == PUBLIC:
        raise FlexOlmoError(f"expert name {name!r} is reserved for the anchor's own expert; choose another")


def check_published(card: ModelCard, where: str) -> None:
    """Check that a model is a published anchor: the public expert with its router row, and no other.

    Args:
        card: of the model.
        where: names the model in a refusal.

    Raises:
        FlexOlmoError: it is none.
    """
    if card.kind != "moe" or card.model.num_experts != 1:
        raise FlexOlmoError(f"{where} has no router row (kind {card.kind}, {card.model.num_experts} experts): expected "
                            "a published anchor, as `flexolmo embed --publish` writes it")


def _read(path: Path) -> bytes:
    try:
        if not path.exists():
            raise FlexOlmoError(f"{path} does not exist; expected {_WHAT}")
        if not path.is_file():  # also keeps us from waiting for the writer of a FIFO
            raise FlexOlmoError(f"{path} is no regular file; expected {_WHAT}")
        with open(path, "rb") as file:
            data = file.read(MAX_CARD_BYTES + 1)
    except OSError as error:
        raise FlexOlmoError(f"{path} cannot be read ({error.strerror}); expected {_WHAT}") from None
    if len(data) > MAX_CARD_BYTES:
        raise FlexOlmoError(f"{path} is larger than {MAX_CARD_BYTES} bytes, the limit for {_WHAT}")
    return data


def _parse(data: bytes) -> ModelCard:
    values = parse_strict_json(data)
    if not isinstance(values, dict):
        raise FlexOlmoError(f"expected a JSON object, got {shown(values)}")
    version = values.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise FlexOlmoError(f"format_version {shown(version)}: expected {FORMAT_VERSION}")
    _check_names(values, ModelCard, "")
    model = _object(values, "model")
    experts = values.get("experts", [])
    if not isinstance(experts, list):
        raise FlexOlmoError(f"experts = {shown(experts)}: expected a list")
    records = [_expert(value, number) for number, value in enumerate(experts)]
    _check_values(values)
    sets = _row_sets(values.get("row_sets", []))
    card = ModelCard(**{**values, "model": _model(model), "experts": records, "row_sets": sets})
    _check_kind(card)
    return card


def _check_names(values: dict[str, Any], schema: type, prefix: str) -> None:
    known = {field.name: field for field in fields(schema)}
    for key in values:
        if key not in known:
            raise FlexOlmoError(f"unknown field {shown(prefix + key)}{nearest(key, known)}")
    for name, entry in known.items():
        if name not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise FlexOlmoError(f"field {prefix + name!r} is missing")


def _object(values: dict[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key, {})
    if not isinstance(value, dict):
        raise FlexOlmoError(f"{key} = {shown(value)}: expected a JSON object")
    return value


def _model(values: dict[str, Any]) -> ModelConfig:
    for key, value in values.items():
        if type(value) in (int, float) and not 0 <= value <= _MAX_NUMBER:
            raise FlexOlmoError(f"model.{key} = {shown(value)}: expected a number from 0 to {_MAX_NUMBER}")
    try:
        model = ModelConfig.from_dict(values, "")
    except FlexOlmoError as error:
        raise FlexOlmoError(str(error).removeprefix(": ")) from None
    for key in ("rotary_base", "layernorm_epsilon"):
        if not 0 < getattr(model, key) < math.inf:
            raise FlexOlmoError(f"model.{key} = {getattr(model, key)}: expected a number above 0")
    return model


def _expert(values: Any, number: int) -> ExpertRecord:
    what = f"experts[{number}]"
    if not isinstance(values, dict):
        raise FlexOlmoError(f"{what} = {shown(values)}: expected a JSON object")
    _check_names(values, ExpertRecord, f"{what}.")
    if number == 0:
        if values["name"] != PUBLIC:
            raise FlexOlmoError(f"{what}.name = {shown(values['name'])}: expected {PUBLIC!r}, the anchor's own expert")
    else:
        try:
            check_expert_name(values["name"])
        except FlexOlmoError as error:
            raise FlexOlmoError(f"{what}: {error}") from None
    if values.get("package_sha256") is not None:
        check_digest(f"{what}.package_sha256", values["package_sha256"])
    for key in ("owner", "licence", "contact"):
        check_text(f"{what}.{key}", values.get(key, ""))
    check_fields(f"{what}.router", values.get("router", {}), ROUTER_FIELDS)
    return ExpertRecord(**values)


def _row_sets(values: Any) -> list[RowSet]:
    if not isinstance(values, list):
        raise FlexOlmoError(f"row_sets = {shown(values)}: expected a list")
    sets = [_row_set(value, f"row_sets[{number}]") for number, value in enumerate(values)]
    names = [row_set.name for row_set in sets]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise FlexOlmoError(f"row_sets[{number}].name = {shown(name)}: expected no name twice")
    return sets


def _row_set(values: Any, what: str) -> RowSet:
    if not isinstance(values, dict):
        raise FlexOlmoError(f"{what} = {shown(values)}: expected a JSON object")
    _check_names(values, RowSet, f"{what}.")
    if not isinstance(values["name"], str) or not _SET_NAME.fullmatch(values["name"]):
        raise FlexOlmoError(f"{what}.name = {shown(values['name'])}: expected {UNTUNED}, {TUNED} or {WITHOUT}NAME")
    for key in ("experts", "proxies"):
        names = values.get(key, [])
        if not isinstance(names, list):
            raise FlexOlmoError(f"{what}.{key} = {shown(names)}: expected a list of expert names")
        try:
            for name in names:
                check_expert_name(name)
        except FlexOlmoError as error:
            raise FlexOlmoError(f"{what}.{key}: {error}") from None
        # A temperature is calibrated on public text alone: its set has no proxies.
        if names if values["name"] == UNTUNED else not names and key == "experts":
            expected = "no name" if names else "at least one name"
            raise FlexOlmoError(f"{what}.{key} = {shown(names)}: expected {expected} for the set {values['name']}")
    if not isinstance(values.get("training", {}), dict):
        raise FlexOlmoError(f"{what}.training = {shown(values['training'])}: expected a JSON object")
    return RowSet(**values)


def _check_values(values: dict[str, Any]) -> None:
    """Check the fields that are neither the model nor experts."""
    kinds = get_args(Kind)
    if values["kind"] not in kinds:
        raise FlexOlmoError(f"kind = {shown(values['kind'])}: expected one of {', '.join(kinds)}")
    tokenizer = values.get("tokenizer", {"type": "byte"})
    named = isinstance(tokenizer, dict) and tokenizer.keys() == {"type", "path"} and tokenizer["type"] == "huggingface"
    if tokenizer != {"type": "byte"} and not named:
        raise FlexOlmoError(f"tokenizer = {shown(tokenizer)}: expected {{'type': 'byte'}}, or 'huggingface' and a "
                            "'path'")
    if named:
        check_text("tokenizer.path", tokenizer["path"])
    for key in ("anchor_digest", "merged_digest"):
        if values.get(key) is not None:
            check_digest(key, values[key])
    if values.get("anchor_path") is not None:
        check_text("anchor_path", values["anchor_path"])
    if values.get("anchor_dtype") not in (None, *_DTYPES):
        raise FlexOlmoError(f"anchor_dtype = {shown(values['anchor_dtype'])}: expected one of {', '.join(_DTYPES)}")
    _object(values, "training")
    if values.get("chosen_top_k") is not None:
        check_number("chosen_top_k", values["chosen_top_k"], int, smallest=1, largest=_MAX_NUMBER)


def _check_kind(card: ModelCard) -> None:
    count, top_k = card.model.num_experts, card.model.top_k
    if card.kind == "moe" and count < 1:
        raise FlexOlmoError(f"model.num_experts = {count}: expected 1 or more for a model of kind 'moe'")
    if card.kind == "pair" and (count, top_k) != (2, 2):
        raise FlexOlmoError(f"model.num_experts = {count}, model.top_k = {top_k}: expected 2 and 2 for a model of kind "
                            "'pair'")
    if card.kind == "router" and (count < 2 or len(card.row_sets) != 1):
        raise FlexOlmoError(f"model.num_experts = {count}, {len(card.row_sets)} row_sets: expected 2 or more, and 1, "
                            "for a model of kind 'router'")
    if card.kind in ("dense", "pair") and card.row_sets:
        raise FlexOlmoError(f"{len(card.row_sets)} row_sets: expected none for a model of kind {card.kind!r}")
    if card.kind == "moe" and card.row_sets and UNTUNED not in [row_set.name for row_set in card.row_sets]:
        raise FlexOlmoError(f"row_sets without the set {UNTUNED!r}: expected it in a model whose router was tuned")
