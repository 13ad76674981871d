"""NeMo's model and optimizer, for any model of this package."""

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from nemo.collections import llm
from nemo.core.optim import McoreDistributedOptimizer
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.lightning.pytorch.optim import MegatronOptimizerModule, OptimizerModule
from torch import nn

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.integrations.nemo.config import FlexOlmoConfig
from flexolmo_megatron.model.router import hold_biases_at_zero
from flexolmo_megatron.training.freezing import FrozenMark
from flexolmo_megatron.training.resume import check_same_card

_CARD = "flexolmo_card"
"""Where a checkpoint's card is, among what NeMo saves beside the tensors."""


class FlexOlmoModel(llm.GPTModel):
    """NeMo's GPTModel; what it starts from is loaded and frozen before NeMo makes DDP and the optimizer.

    ``card`` says what it is, and travels in every checkpoint: a run goes on with its own checkpoints alone.
    """

    def __init__(self, config: FlexOlmoConfig | None = None, optim: OptimizerModule | None = None,
                 tokenizer: Any = None, model_transform: Any = None) -> None:
        optim = optim or FlexOlmoOptimizer(OptimizerConfig(lr=TrainConfig().optimizer.lr))
        super().__init__(config or FlexOlmoConfig(), optim, tokenizer, model_transform)
        self.card: ModelCard | None = None

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build, fill and freeze; does nothing where that is done.

        Raises:
            FlexOlmoError: as ``FlexOlmoConfig``; the checkpoint to go on with belongs to another run.
        """
        if hasattr(self, "module"):
            return
        super().configure_model(vp_stage)
        self.card = self.config.fill_and_freeze(self.module)
        if path := self._trainer and self._trainer.ckpt_path:
            check_same_card(ckpt_to_weights_subdir(path, is_saving=False).parent, self.card, saved_state(path)[1])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_CARD] = self.card.to_json()

    def on_train_start(self) -> None:
        self._frozen = FrozenMark([self.module])

    def on_train_end(self) -> None:
        """Show that nothing frozen has moved.

        Raises:
            RuntimeError: a frozen parameter has changed (a defect of this package).
        """
        self._frozen.check()


def saved_state(checkpoint: str | Path) -> tuple[dict[str, Any], ModelCard]:
    """What a NeMo checkpoint holds beside its tensors, and its card.

    Raises:
        FlexOlmoError: it was not written by this package's model.
    """
    state = load_common_state_dict(str(ckpt_to_weights_subdir(checkpoint, is_saving=False)))
    if _CARD not in state:
        raise FlexOlmoError(f"{checkpoint} has no {_CARD}: expected a NeMo checkpoint of a FlexOlmoModel")
    return state, ModelCard.from_json(state[_CARD])


class FlexOlmoOptimizer(MegatronOptimizerModule):
    """Megatron's optimizer. NeMo 2.7.3 itself calls it as core 0.15 had it, which 0.16 refuses."""

    def optimizers(self, model: MegatronParallel) -> list[McoreDistributedOptimizer]:
        """AdamW over what trains; norms and biases do not decay."""
        made = get_megatron_optimizer(self.config, [chunk.module for chunk in model],
                                      get_standard_config_overrides(self.config))
        for group in made.param_groups:  # else Megatron's schedule would, which NeMo does not use
            group["weight_decay"] *= group.get("wd_mult", 1.0)
        return [McoreDistributedOptimizer(made)]

    def finalize_model_grads(self, chunks: list[nn.Module], *args: Any, **options: Any) -> None:
        super().finalize_model_grads(chunks, *args, **options)
        for chunk in chunks:
            hold_biases_at_zero(chunk)
