"""The files of a Hugging Face tokenizer that travel with a model."""

import shutil
from pathlib import Path

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "merges.txt", "tokenizer.model", "chat_template.jinja")


def tokenizer_folder(tokenizer: dict[str, str]) -> Path | None:
    """Return the folder that a card's tokenizer is in; None for a name, for bytes, and for a folder that is gone."""
    path = tokenizer.get("path") if tokenizer["type"] == "huggingface" else None
    return Path(path) if path and Path(path).is_dir() else None


def tokenizer_in(directory: Path) -> dict[str, str] | None:
    """Describe the tokenizer that lies in a model's own directory, as a card does; None where there is none."""
    if any((directory / name).exists() for name in _FILES):
        return {"type": "huggingface", "path": str(directory.resolve())}
    return None


def copy_tokenizer(tokenizer: dict[str, str], directory: Path) -> None:
    """Put a card's tokenizer beside the weights, if it is a local folder."""
    folder = tokenizer_folder(tokenizer)
    for name in _FILES if folder else ():
        if (folder / name).is_file():
            shutil.copyfile(folder / name, directory / name)
