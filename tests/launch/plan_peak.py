"""Two training steps in a process of its own, and the most memory it had for them; see test_plan_peak.py."""

from typing import Any

from flexolmo_megatron.launch.plan_work import Layout, Work


def _train(work: Work, layout: Layout, steps: int) -> None:
    """As ``training/start.py`` and ``training/loop.py`` build and step, with random weights and tokens."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from flexolmo_megatron.config.train import TrainConfig
    from flexolmo_megatron.model.builder import build_model
    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.training.freezing import freeze_anchor
    from flexolmo_megatron.training.optimization import build_optimizer

    get_moe_layer_wise_logging_tracker().clear()
    half = work.element == 2
    megatron_config = transformer_config(
        work.model,
        work.kind,
        dtype=torch.bfloat16 if half else torch.float32,
        perform_initialization=False,  # would make every weight twice
        **({} if work.kind == "dense" else {"moe_z_loss_coeff": 1e-3}),
    )
    model = build_model(work.model, work.kind, megatron_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    if work.mode == "expert":
        freeze_anchor(model)
    if work.mode == "router":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp.router." in name)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed)
    wrapped = DistributedDataParallel(
        megatron_config, settings, Float16Module(megatron_config, model) if half else model
    )
    config = TrainConfig(out="", bf16=half)
    config.optimizer.use_distributed_optimizer = layout.distributed
    optimizer = build_optimizer(config, [wrapped])
    tokens = torch.randint(work.model.vocab_size, (layout.micro_batch, work.sequence))
    positions = torch.arange(work.sequence).expand_as(tokens)
    for _ in range(steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        wrapped(tokens, positions, None, labels=tokens).float().mean().backward()
        finalize_model_grads([wrapped])
        optimizer.step()


def measure(small: dict[str, Any], large: dict[str, Any], layout: Layout) -> int:
    """Return the bytes by which the process's peak resident memory in two steps of ``large`` exceeds its memory before.

    ``small`` runs first, so that libraries and their buffers are loaded. Fields of ``Work`` as dicts: it is no value.
    """
    import gc
    import re
    from pathlib import Path

    import psutil

    from flexolmo_megatron.runtime.setup import initialize

    initialize()
    _train(Work(**small), layout, 2)
    gc.collect()
    before = psutil.Process().memory_info().rss
    _train(Work(**large), layout, 2)
    # Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    return peak - before
