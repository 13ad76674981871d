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


def on_cpu(recipe: Any, *, steps: int, save_every: int, learning_rate: float, seq_length: int, micro_batch_size: int,
           global_batch_size: int) -> Any:
    """Change a recipe to one process in fp32, at sizes for a CPU; returns it."""
    trainer, optimizer, data, checkpoints = recipe.trainer, recipe.optim.config, recipe.data, recipe.log.ckpt
    trainer.accelerator, trainer.devices, trainer.plugins, trainer.enable_progress_bar = "cpu", 1, None, False
    trainer.max_steps, trainer.log_every_n_steps = steps, 1
    optimizer.bf16, optimizer.use_distributed_optimizer, optimizer.lr = False, False, learning_rate
    if recipe.optim.lr_scheduler is not None:
        recipe.optim.lr_scheduler.warmup_steps = min(10, steps // 10)
    recipe.model.config.seq_length = data.seq_length = seq_length
    data.micro_batch_size, data.global_batch_size, data.num_workers = micro_batch_size, global_batch_size, 0
    checkpoints.every_n_train_steps, checkpoints.train_time_interval = save_every, None
    checkpoints.save_top_k = 0  # the last alone
    return recipe
