"""Tokens and FLOPs of training runs, so that every method's can be compared and printed."""

from dataclasses import replace
from typing import cast

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.launch.plan_compute import chunk_flops
from flexolmo_megatron.launch.plan_work import Layout, Mode, chunks, work_of
from flexolmo_megatron.training.flops import forward_flops


def run_tokens(config: TrainConfig) -> int:
    """Return the tokens that a run trains on."""
    return config.train_iters * config.global_batch_size * config.data.seq_length


def step_flops(mode: str, model: ModelConfig, config: TrainConfig) -> int:
    """Return the floating-point operations of one step, forward and backward, as ``training/flops.py`` counts them.

    Args:
        mode: of `flexolmo train`.
        model: what is trained, or for an expert's run the anchor.
        config: of the run.
    """
    if mode == "expert" and not config.expert.coordination:
        mode = "dense"
    work = work_of(replace(config, model=model), cast(Mode, mode), "local")
    layout = Layout(world=1, micro_batch=config.global_batch_size)
    flops = sum(chunk_flops(work, layout, chunk) for chunk in chunks(work, layout, 0))
    if mode == "expert" and config.expert.anchor_kl_coeff:  # the anchor alone, on public sequences
        flops += config.data.public_share * forward_flops(model, config.global_batch_size, config.data.seq_length)
    return round(flops)


def run_flops(mode: str, model: ModelConfig, config: TrainConfig) -> int:
    """Return the floating-point operations of a whole run."""
    return config.train_iters * step_flops(mode, model, config)
