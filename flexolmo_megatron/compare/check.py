"""Whether a comparison can work, before its first step starts: held-out files are others than the training files, and
what the steps need is installed and can be loaded."""

import filecmp
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_megatron.compare.config import Texts, owner_options, public_embed
from flexolmo_megatron.domain.embed import ANCHOR
from flexolmo_megatron.domain.text_models import check_installed
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.documents import find_files
from flexolmo_megatron.training.tokenizer import load_tokenizer, tokenizer_spec

if TYPE_CHECKING:
    from flexolmo_megatron.compare.plan import Comparison


def check_held_out(domain: str, texts: Texts, proxy_public: Sequence[str]) -> None:
    """Compare the files of valid with those of train and with those that proxies are picked from; only files of one
    size are read.

    Raises:
        FlexOlmoError: a file is in both, or a copy of it.
    """
    trained: dict[int, list[tuple[Path, str]]] = defaultdict(list)
    for name, files in (("train", texts.train), ("proxy_public", proxy_public)):
        for path in find_files(files):
            trained[path.stat().st_size].append((path, name))
    for path in find_files(texts.valid):
        size = path.stat().st_size
        for other, name in trained[size] if size else ():
            if filecmp.cmp(path, other, shallow=False):
                what = f"is in {name} and in valid" if path == other else f"of valid is a copy of {other} of {name}"
                raise FlexOlmoError(f"{domain}: {path} {what}: expected other documents in valid")


def check_tools(comparison: "Comparison") -> None:
    """Load the tokenizer, unless all documents are tokenized, and look for the packages of embedders.

    Raises:
        FlexOlmoError: the tokenizer cannot be loaded or has more ids than the model, or a package is missing.
    """
    config = comparison.config
    if not all(comparison.plan.is_done(f"data/{domain}") for domain in config.domains):
        tokenizer = load_tokenizer(tokenizer_spec(config.tokenizer))
        if tokenizer.vocab_size > config.model.vocab_size:
            raise FlexOlmoError(f"model.vocab_size = {config.model.vocab_size}: expected at least "
                                f"{tokenizer.vocab_size}, the ids of the tokenizer {config.tokenizer}")
    ablations = (*config.ablations, *config.variants) if "ablations" in comparison.families else ()
    for name in (None, *ablations):
        for embed in (public_embed(config, name), owner_options(config, name)[1]):
            if (embedder := embed.get("embedder", ANCHOR)) != ANCHOR:
                check_installed(str(embedder))
