"""Megatron's optimizer and schedule from a run's configuration, and its step in two halves."""

import math
from collections.abc import Callable
from typing import Any

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
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from flexolmo_megatron.config.train import TrainConfig


def optimizer_config(config: TrainConfig, config_class: Callable[..., Any] = OptimizerConfig) -> Any:
    """Megatron's configuration of AdamW, or what another framework makes of its fields."""
    settings = config.optimizer
    return config_class(
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


def build_optimizer(config: TrainConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over the parameters that train, with global gradient clipping."""
    settings = config.optimizer
    megatron_config = optimizer_config(config)
    overrides = get_standard_config_overrides(megatron_config)  # no weight decay of norms and biases
    if settings.router_lr is not None:
        ratio = settings.router_lr / settings.lr
        # lr_mult has no effect of its own: it is one of the keys by which a loaded checkpoint's groups are told apart.
        override = {"max_lr": settings.router_lr, "min_lr": settings.min_lr * ratio, "lr_mult": ratio}
        overrides[ParamKey(name="*.mlp.router.*")] = ParamGroupOverride(**override)
    optimizer = get_megatron_optimizer(megatron_config, chunks, overrides)
    if USING_PYTORCH_OPTIMIZER:
        # Without Transformer Engine and apex upstream takes torch's AdamW, and leaves its fused kernel off.
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that one is made of: Megatron chains several, or it is a single one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


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


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The norm of all gradients of all ranks, clipping or not: the first half of a step, which changes nothing yet.

    Upstream's ``step`` goes on whatever the norm is: without a loss scaler it looks for no NaN.
    """
    if optimizer.prepare_grads():  # a loss scaler, where there is one, has found a value that is not finite
        return math.inf
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip and update weights: the second half of a step, as upstream's ``ChainedOptimizer.step`` (0.16.1) does it.

    Args:
        optimizer: from ``build_optimizer``, after ``gradient_norm``.
        norm: what that returned; finite, and the same on all ranks.
    """
    for part in parts(optimizer):
        if part.config.clip_grad > 0 and not part.is_stub_optimizer and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(
                parameters,
                part.config.clip_grad,
                norm,
                part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
