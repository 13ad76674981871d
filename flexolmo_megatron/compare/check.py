"""Whether what the steps of a comparison need is installed and can be loaded, before the first of them starts."""

from flexolmo_megatron.compare.config import owner_options, public_embed
from flexolmo_megatron.compare.plan import Comparison
from flexolmo_megatron.domain.embed import ANCHOR
from flexolmo_megatron.domain.text_models import check_installed
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.tokenizer import load_tokenizer, tokenizer_spec


def check_tools(comparison: Comparison) -> None:
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
