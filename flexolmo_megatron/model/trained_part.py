"""Models for trainers of other frameworks, which save and load what the model itself describes."""

from typing import Any

from megatron.core.models.gpt import GPTModel


class TrainedPartModel(GPTModel):
    """A pair, or a merged model whose router is tuned: its checkpoints hold what trains alone, and the card names the
    anchor or merged model that has the rest."""

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's description of a checkpoint, without what is frozen."""
        trained = self._trained()
        whole = super().sharded_state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in whole.items() if name in trained}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what such a checkpoint holds; the frozen rest stays as it was filled."""
        if strict and set(state_dict) != self._trained():
            difference = sorted(set(state_dict) ^ self._trained())
            raise RuntimeError(f"the checkpoint and this rank's model differ in {', '.join(difference[:5])}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)
