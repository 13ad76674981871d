"""What a run will train, before anything is built."""

from dataclasses import dataclass

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.convert.lazy import LazyModel


@dataclass
class Plan:
    """What a run will train: known before any process group exists, and before any tensor is read."""

    card: ModelCard
    """What the run's checkpoints will hold; of an owner's run still without digest and provenance of the row."""
    source: LazyModel
    """Where the weights come from; of an owner's pair, the anchor."""
    anchor: LazyModel | None = None
    """The published anchor of an owner's run."""

    @property
    def built(self) -> ModelCard:
        """The model that computes: of router tuning the merged one, of which checkpoints hold only a part."""
        return self.source.card if self.card.kind == "router" else self.card

    @property
    def anchor_ffn_hidden_size(self) -> int | None:
        """Width of the frozen FFN of a pair."""
        return self.anchor.card.model.ffn_hidden_size if self.anchor and self.card.kind == "pair" else None
