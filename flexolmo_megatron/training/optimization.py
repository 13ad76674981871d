"""Megatron's optimizer and schedule from a run's configuration."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from flexolmo_megatron.config.train import TrainConfig


def build_optimizer(config: TrainConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over the parameters that train, with global gradient clipping."""
    settings = config.optimizer
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=config.bf16,
        params_dtype=torch.bfloat16 if config.bf16 else torch.float32,
        use_distributed_optimizer=settings.use_distributed_optimizer,
    )
    overrides = get_standard_config_overrides(optimizer_config)  # no weight decay of norms and biases
    if settings.router_lr is not None:
        ratio = settings.router_lr / settings.lr
        # lr_mult has no effect of its own: it is one of the keys by which a loaded checkpoint's groups are told apart.
        override = {"max_lr": settings.router_lr, "min_lr": settings.min_lr * ratio, "lr_mult": ratio}
        overrides[ParamKey(name="*.mlp.router.*")] = ParamGroupOverride(**override)
    optimizer = get_megatron_optimizer(optimizer_config, chunks, overrides)
    if USING_PYTORCH_OPTIMIZER:
        # Without Transformer Engine and apex upstream takes torch's AdamW, and leaves its fused kernel off.
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def build_scheduler(config: TrainConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """The learning rate by optimizer step."""
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=config.train_iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=settings.lr_wsd_decay_iters or None,
        lr_wsd_decay_style="linear",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
