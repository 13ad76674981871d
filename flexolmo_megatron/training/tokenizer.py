"""Text to token ids and back: the built-in byte tokenizer, or any Hugging Face tokenizer.

Both serve as the ``tokenizer`` of megatron-core's ``GPTDatasetConfig``, which reads ``eod``, ``vocab_size`` and
``unique_identifiers`` (megatron/core/datasets/gpt_dataset.py and megatron_dataset.py, 0.16.1). Neither defines ``pad``:
samples are cut from a continuous stream of documents, so nothing is padded. Importing this module loads neither torch
nor transformers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from flexolmo_megatron.errors import FlexOlmoError, first_line, nearest

BYTES = 256


class Tokenizer(ABC):
    """What every part of the package needs of a tokenizer."""

    spec: dict[str, str]
    """What a checkpoint's card stores and ``load_tokenizer`` takes."""
    eod: int
    """Id of the token that ends every document."""
    vocab_size: int
    """Number of ids; a model's vocabulary may be larger, never smaller."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` taken as plain text: nothing is added, and no text turns into a special token."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; end-of-document and other special tokens give no text."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Part of the key under which Megatron caches a data set's indices."""
        return self.spec


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 ends a document."""

    def __init__(self) -> None:
        self.spec = {"type": "byte"}
        self.eod = BYTES
        self.vocab_size = BYTES + 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are not valid UTF-8 (a cut character) become U+FFFD."""
        return bytes(token for token in ids if token < BYTES).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that ``transformers.AutoTokenizer`` loads; its end-of-sequence token ends a document."""

    def __init__(self, path: str) -> None:
        """Load from ``path``, a folder or the name of a repository. No code of the repository is run.

        Raises:
            FlexOlmoError: transformers is missing, there is no such tokenizer, or it has no end-of-sequence token.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise FlexOlmoError(f"the tokenizer {path!r} needs transformers; "
                                "install it with: pip install transformers") from None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers passes on whatever its many readers raise
            raise FlexOlmoError(f"cannot load the tokenizer {path!r}: expected 'byte', a folder with a Hugging Face "
                                f"tokenizer, or the name of one ({first_line(error)})") from error
        if self._tokenizer.eos_token_id is None:
            raise FlexOlmoError(f"the tokenizer {path!r} has no end-of-sequence token, which must end every document")
        self.spec = {"type": "huggingface", "path": path}
        self.eod = self._tokenizer.eos_token_id
        self.vocab_size = len(self._tokenizer)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return HuggingFaceTokenizer, (self.spec["path"],)  # other processes load it themselves

    def encode(self, text: str) -> list[int]:
        # split_special_tokens: a document that contains "<|endoftext|>" must not be able to end itself. verbose=False:
        # documents longer than the tokenizer's model_max_length are cut into sequences later, no reason to warn.
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_tokenizer(spec: Mapping[str, str]) -> Tokenizer:
    """The tokenizer that a card describes: ``{"type": "byte"}`` or ``{"type": "huggingface", "path": name or folder}``.

    Raises:
        FlexOlmoError: an unknown type, a missing path, or a tokenizer that cannot be loaded.
    """
    kind = spec.get("type")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "huggingface":
        if not isinstance(spec.get("path"), str):
            raise FlexOlmoError(f"tokenizer {dict(spec)}: expected a 'path', "
                                "the name or folder of a Hugging Face tokenizer")
        return HuggingFaceTokenizer(spec["path"])
    raise FlexOlmoError(f"tokenizer type {kind!r}: expected 'byte' or 'huggingface'"
                        f"{nearest(str(kind), ('byte', 'huggingface'))}")


def tokenizer_spec(name: str) -> dict[str, str]:
    """The spec for what a user writes: ``byte``, or the name or folder of a Hugging Face tokenizer."""
    if name == "byte":
        return {"type": "byte"}
    return {"type": "huggingface", "path": str(Path(name).resolve()) if Path(name).is_dir() else name}
