"""Whether a checkpoint belongs to the run that wants to go on from it."""

from pathlib import Path

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.errors import FlexOlmoError


def check_same_card(checkpoint: Path, card: ModelCard, saved: ModelCard | None = None) -> None:
    """Compare a run's model with that of its checkpoint: of an owner's run also the anchor and the expert's name.

    Weights of one anchor's expert would fit into the pair of another, and train on without a word.

    Args:
        checkpoint: to go on with.
        card: of the run.
        saved: of the checkpoint, where it is not in a file there.

    Raises:
        FlexOlmoError: they differ; with both values.
    """
    saved = saved or ModelCard.load(checkpoint)
    for what, before, now in (
        ("kind", saved.kind, card.kind),
        ("architecture", saved.model, card.model),
        ("experts", saved.expert_names, card.expert_names),
        ("anchor digest", saved.anchor_digest, card.anchor_digest),
        ("router rows' origin", [e.router for e in saved.experts], [e.router for e in card.experts]),
        ("merged model's digest", saved.merged_digest, card.merged_digest),
        ("row set", *([(s.name, s.experts, s.proxies) for s in sets] for sets in (saved.row_sets, card.row_sets))),
    ):
        if before != now:
            raise FlexOlmoError(
                f"{checkpoint} belongs to another run: its {what} is {before}, this run's is {now}; name a new folder "
                f"for this run, or start it as the first one was started"
            )
