"""Which faults of megatron-core, as imported by this process, are there: run by test_patches.py in its own process.

Prints a JSON object: name of a patch -> null where its fault is not there, else what happens.
"""

import json
import tempfile
from collections.abc import Callable
from types import SimpleNamespace

import torch


def router_without_transformer_engine() -> None:
    from megatron.core.transformer.moe.moe_utils import RouterGatingLinearFunction

    hidden, rows = torch.randn(3, 2, 8), torch.randn(4, 8)
    logits = RouterGatingLinearFunction.apply(hidden, rows, None, torch.float32)
    torch.testing.assert_close(logits, hidden @ rows.T)


def _training(decoupled_lr: float | None, distributed: bool) -> SimpleNamespace:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Model(MegatronModule):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config)
            generator = torch.Generator().manual_seed(1)
            self.first = torch.nn.Parameter(torch.randn(6, 5, generator=generator))
            self.second = torch.nn.Parameter(torch.randn(5, 6, generator=generator))
            self.second.is_embedding_or_output_parameter = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.first).tanh() @ self.second

    module = Model(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
    chunk = DistributedDataParallel(
        module.config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), module
    )
    config = OptimizerConfig(
        optimizer="adam", lr=0.1, min_lr=0.0, use_distributed_optimizer=distributed, decoupled_lr=decoupled_lr
    )
    optimizer = get_megatron_optimizer(config, [chunk], get_standard_config_overrides(config))
    schedule = dict(init_lr=0.0, max_lr=0.1, min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=100, lr_decay_style="linear",
                    start_wd=0.0, end_wd=0.0, wd_incr_steps=0, wd_incr_style="constant",
                    use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True)
    return SimpleNamespace(chunk=chunk, optimizer=optimizer, scheduler=OptimizerParamScheduler(optimizer, **schedule))


def _steps(state: SimpleNamespace, count: int) -> None:
    for _ in range(count):
        state.chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        state.chunk(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
        state.chunk.finish_grad_sync()
        state.optimizer.step()
        state.scheduler.step(1)


def _resumes_exactly(decoupled_lr: float | None, distributed: bool) -> None:
    """Two steps, a checkpoint, two steps; against two steps of a new process's state after loading it."""
    from megatron.core import dist_checkpointing

    metadata = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}

    def sharded(state: SimpleNamespace, is_loading: bool) -> dict:
        model = state.chunk.module.sharded_state_dict(metadata=metadata)
        return {"model": model, "optimizer": state.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}

    before, after = _training(decoupled_lr, distributed), _training(decoupled_lr, distributed)
    _steps(before, 2)
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(sharded(before, False), folder)
        loaded = dist_checkpointing.load(sharded(after, True), folder)
    after.chunk.module.load_state_dict(loaded["model"])
    after.optimizer.load_state_dict(loaded["optimizer"])
    after.scheduler.step(2)
    for state in (before, after):
        _steps(state, 2)
    for expected, actual in zip(before.chunk.parameters(), after.chunk.parameters(), strict=True):
        assert torch.equal(expected, actual), "resumed training differs"


def decoupled_lr_survives_loading() -> None:
    _resumes_exactly(decoupled_lr=0.5, distributed=False)


def torch_adamw_in_distributed_optimizer() -> None:
    _resumes_exactly(decoupled_lr=None, distributed=True)


def _fault(check: Callable[[], None]) -> str | None:
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    # Before the CPU runtime, which works around this one.
    faults = {"router_without_transformer_engine": _fault(router_without_transformer_engine)}

    from flexolmo_megatron.runtime.setup import initialize

    initialize()
    for check in (decoupled_lr_survives_loading, torch_adamw_in_distributed_optimizer):
        faults[check.__name__] = _fault(check)
    print(json.dumps(faults))
