"""``flexolmo.json``: the small file beside a checkpoint's tensors that says what they are and where they came from.

It lies in every Megatron checkpoint that this package writes and beside the ``config.json`` of every Hugging Face
directory that it exports (transformers ignores it; a directory without one gets numbered expert names).
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import read_json, write_json

CARD_FILE = "flexolmo.json"
FORMAT_VERSION = 1
PUBLIC = "public"
"""Name of the anchor's own expert: always expert 0, and never excluded."""

Kind = Literal["dense", "moe", "pair"]


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
    """How its router row was made: embedder, number of documents."""


@dataclass
class ModelCard:
    """What a checkpoint holds."""

    kind: Kind
    """dense: no experts. moe: FlexOlmo experts and router. pair: only what an owner trained; the rest is in the
    anchor."""
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

    def __post_init__(self) -> None:
        expected = self.model.num_experts
        if self.kind == "dense" and expected:
            raise FlexOlmoError(f"a dense model with model.num_experts = {expected}: expected 0")
        if len(self.experts) != expected:
            raise FlexOlmoError(
                f"{len(self.experts)} expert names for model.num_experts = {expected}: expected one each"
            )
        names = self.expert_names
        if len(set(names)) != len(names):
            raise FlexOlmoError(f"expert names must be unique, got {names}")

    @property
    def expert_names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    def save(self, directory: Path) -> None:
        """Write the card into ``directory``."""
        write_json(directory / CARD_FILE, {"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, directory: Path) -> "ModelCard":
        """Read the card of ``directory``.

        Raises:
            FlexOlmoError: it is missing, broken, or of another format version.
        """
        path = directory / CARD_FILE
        values = read_json(path, "the card of a FlexOlmo checkpoint")
        try:
            version = values.pop("format_version")
            if version != FORMAT_VERSION:
                raise FlexOlmoError(f"{path}: format_version {version!r}: expected {FORMAT_VERSION}")
            model = ModelConfig.from_dict(values.pop("model"), str(path))
            experts = [ExpertRecord(**expert) for expert in values.pop("experts")]
            return cls(model=model, experts=experts, **values)
        except FlexOlmoError:
            raise
        except (AttributeError, KeyError, TypeError) as error:
            raise FlexOlmoError(f"{path} is not the card of a FlexOlmo checkpoint: {error}") from error
