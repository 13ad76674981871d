"""NeMo on a machine without CUDA: import this first. For examples and tests; on a GPU nothing here is needed."""

from types import SimpleNamespace
from typing import Any

from flexolmo_megatron.runtime.setup import prepare

prepare()  # before anything imports Megatron

from nemo.lightning import nemo_logger  # noqa: E402
from nemo.lightning.io import pl  # noqa: E402

# NeMo asks whether callbacks are of this class of nvidia-resiliency-ext, which exists for CUDA alone.
nemo_logger.lcp = SimpleNamespace(LocalCheckpointCallback=type("LocalCheckpointCallback", (), {}))
# NeMo moves a loaded checkpoint to the GPU, which it takes for granted.
pl._fix_tensors_device = lambda checkpoint: checkpoint


def on_cpu(recipe: Any) -> None:
    """Change a recipe to one process per node, in fp32."""
    trainer, optimizer = recipe.trainer, recipe.optim.config
    trainer.accelerator, trainer.devices, trainer.plugins = "cpu", 1, None
    optimizer.bf16, optimizer.use_distributed_optimizer = False, False
    recipe.data.num_workers = 0
