"""``PREFIX.json``: the small file beside a tokenized data set ``PREFIX.bin``/``PREFIX.idx`` that says what it holds."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import read_json, write_json

FORMAT_VERSION = 1


@dataclass
class DatasetInfo:
    """What a data set holds. Never any text of its documents."""

    tokenizer: dict[str, str]
    """What the documents were encoded with, as ``load_tokenizer`` takes it."""
    vocab_size: int
    """Number of ids of that tokenizer."""
    end_of_document: int
    """Id of the token that ends every document."""
    documents: int = 0
    """Number of documents."""
    tokens: int = 0
    """Number of tokens, the end-of-document tokens included."""
    text_bytes: int = 0
    """Bytes of the documents' text as UTF-8: what bits per byte are counted over."""
    largest_token: int = 0
    """The largest id that occurs."""
    skipped: dict[str, int] | None = None
    """How many documents of the input were unusable, by kind; of the whole input, also where it was split in two."""

    def save(self, path: Path) -> None:
        """Write to ``path``."""
        write_json(path, {"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, prefix: str | Path) -> "DatasetInfo | None":
        """Read ``PREFIX.json``; None where there is none, as for a data set that another program wrote.

        Raises:
            FlexOlmoError: the file is broken or of another format version.
        """
        path = Path(f"{prefix}.json")
        if not path.exists():
            return None
        values: Any = read_json(path, "the description of a tokenized data set")
        known = {field.name for field in fields(cls)} | {"format_version"}
        if not isinstance(values, dict) or set(values) != known or values.pop("format_version") != FORMAT_VERSION:
            raise FlexOlmoError(f"{path} is not the description of a tokenized data set in format version "
                                f"{FORMAT_VERSION}; make the data set again with: flexolmo data")
        return cls(**values)


def common_tokenizer(prefixes: Iterable[str | Path], vocab_size: int) -> dict[str, str] | None:
    """What data sets were encoded with: the tokenizer of a new model that is trained on them.

    Args:
        prefixes: data sets; those of another program, which say nothing about it, are passed over.
        vocab_size: ids that the model will know.

    Returns:
        The tokenizer, as ``load_tokenizer`` takes it; None where no data set says.

    Raises:
        FlexOlmoError: they differ, or the tokenizer has more ids.
    """
    infos = {prefix: info for prefix in prefixes if (info := DatasetInfo.load(prefix)) is not None}
    for prefix, info in infos.items():
        first, expected = next(iter(infos.items()))
        if info.tokenizer != expected.tokenizer:
            raise FlexOlmoError(f"{prefix} was tokenized with {info.tokenizer}, {first} with {expected.tokenizer}: "
                                "expected one tokenizer for all data of a model")
        if info.vocab_size > vocab_size:
            raise FlexOlmoError(f"model.vocab_size = {vocab_size}: expected at least {info.vocab_size}, the ids of the "
                                f"tokenizer of {prefix}, {info.tokenizer}")
    return next((info.tokenizer for info in infos.values()), None)
