"""The plan against the model that Megatron really builds: shapes and bytes of chosen ranks, nothing allocated.

A process pretends to be one rank of a launch (torch's fake process group); all tensors are on the meta device.
"""

import re
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any

import pytest

from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.launch.plan_state import chunk_parameters, state
from flexolmo_megatron.launch.plan_work import Layout, Work, chunks, work_of
from tests.distributed import run_distributed

MODES = {"expert": "7b-pair", "moe": "37b", "router": "37b", "anchor": "7b-pair"}
CASES = [
    # mode, layout, ranks: first, middle and last pipeline stages; first, middle and last data-parallel ranks.
    ("expert", Layout(64, tensor=2, pipeline=4), (0, 17, 33, 63)),
    ("expert", Layout(256, tensor=4, pipeline=4, virtual=2), (0, 97, 255)),
    ("expert", Layout(64, tensor=8, distributed=False), (0, 63)),
    ("expert", Layout(1024, tensor=2, pipeline=8), (1, 512, 1023)),
    ("anchor", Layout(64, tensor=2, pipeline=2), (0, 63)),
    ("moe", Layout(64, tensor=1, pipeline=4, expert=8), (0, 21, 63)),
    ("moe", Layout(64, tensor=2, pipeline=2, expert=4, expert_tensor=2), (0, 63)),
    ("moe", Layout(256, tensor=4, pipeline=4, virtual=4, expert=8, expert_tensor=1), (0, 100, 255)),
    ("moe", Layout(1024, tensor=2, pipeline=8, expert=8, expert_tensor=2), (0, 500, 1023)),
    ("moe", Layout(64, tensor=2, context=2, expert=8, expert_tensor=1), (0, 63)),
    ("expert", Layout(64, pipeline=2, context=4), (5, 63)),
    ("moe", Layout(64, tensor=8, expert_tensor=8, distributed=False), (0, 63)),
    ("moe", Layout(1), (0,)),
    ("expert", Layout(1), (0,)),
    ("router", Layout(64, tensor=1, pipeline=2, expert=8), (0, 63)),
]  # fmt: skip


def _work(mode: str) -> Work:
    return work_of(load_config(TrainConfig, preset=MODES[mode], overrides=["data.train=[x]", "out=x"]), mode, "local")


def _become(rank: int, layout: Layout) -> None:
    """Make this process one rank of a launch that does not exist."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _build_rank(mode: str, layout: Layout, config: TrainConfig, model: Any) -> dict[str, Any]:
    """Build this rank's model, DDP and optimizer state on the meta device; returns what the plan says of it."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from flexolmo_megatron.model.builder import build_model
    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.training.freezing import freeze_anchor
    from flexolmo_megatron.training.memory import memory_report
    from flexolmo_megatron.training.optimization import build_optimizer

    kind = {"expert": "pair", "anchor": "dense"}.get(mode, "moe")
    megatron_config = transformer_config(
        model,
        kind,
        dtype=torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
    )
    wrapped, shapes = [], []
    for virtual in range(layout.virtual):
        stage = dict(vp_stage=virtual if layout.virtual > 1 else None)
        module = build_model(
            model,
            kind,
            megatron_config,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage),
            **stage,
        )
        if mode == "expert":
            freeze_anchor(module)
        if mode == "router":
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(".mlp.router." in name)
        shapes.append([(name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()])
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed
        )
        wrapped.append(DistributedDataParallel(megatron_config, settings, Float16Module(megatron_config, module)))
    config.optimizer.use_distributed_optimizer = layout.distributed
    optimizer = build_optimizer(config, wrapped)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # A first step of torch's AdamW makes its state; its fused kernel does not know the meta device.
        for group in part.optimizer.param_groups:
            group["fused"] = False
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        part.optimizer.step()
    for chunk in wrapped:
        for parameter in chunk.parameters():
            parameter.grad = None
    report = memory_report(wrapped, optimizer)
    return {
        "shapes": shapes,
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "rank": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "expert_rank": parallel_state.get_expert_data_parallel_rank(),
        "trained": report.trainable_parameters,
        "frozen": report.frozen_parameters,
        "weights": report.weight_bytes,
        "gradients": report.gradient_bytes,
        "optimizer": report.optimizer_bytes,
    }


def build_all(cases: list[tuple[str, Layout, tuple[int, ...]]]) -> list[list[dict[str, Any]]]:
    """Runs in a process of its own."""
    import torch
    from torch.overrides import TorchFunctionMode

    from flexolmo_megatron.runtime.setup import prepare

    class NamesOfCuda(TorchFunctionMode):
        """Megatron's optimizer compares the names of tensor types."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result.replace(".meta.", ".") if func is torch.Tensor.type and isinstance(result, str) else result

    prepare()
    NamesOfCuda().__enter__()
    new_group = torch.distributed.new_group
    # Megatron's optimizer also wants gloo groups, whose processes would look for each other.
    torch.distributed.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})
    torch.cuda.current_device = lambda: torch.device("meta")  # where Megatron puts its buffers
    results = []
    for mode, layout, ranks in cases:
        config = load_config(TrainConfig, preset=MODES[mode], overrides=["data.train=[x]", "out=x"])
        model = _work(mode).model
        built = []
        for rank in ranks:
            _become(rank, layout)
            with torch.device("meta"):
                built.append(_build_rank(mode, layout, config, model))
        results.append(built)
    return results


@pytest.fixture(scope="module")
def built() -> list[list[dict[str, Any]]]:
    return run_distributed(build_all, 1, CASES)[0]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{case[0]}-{case[1].world}" for case in CASES])
def test_plan_matches_what_megatron_builds(built, index):
    mode, layout, ranks = CASES[index]
    work = _work(mode)
    stages = set()
    for rank, real in zip(ranks, built[index], strict=True):
        stages.add(real["stage"])
        for chunk, shapes in zip(chunks(work, layout, real["stage"]), real["shapes"], strict=True):
            planned = [(p.name, p.shape, p.trains) for p in chunk_parameters(work, layout, chunk)]
            assert planned == shapes, f"rank {rank}"
        planned = state(work, layout, real["stage"], real["rank"], real["expert_rank"])
        compared = ("trained", "frozen", "weights", "gradients", "optimizer")
        assert [getattr(planned, name) for name in compared] == [real[name] for name in compared], f"rank {rank}"
    assert {0, layout.pipeline - 1} <= stages


def test_padding_counts(built):
    """The comparison above can fail: neither bare sizes nor an even split give the same bytes."""
    mode, layout, _ = CASES[0]
    real = built[0][0]
    assert real["gradients"] > 4 * real["trained"]
    assert real["weights"] != state(_work(mode), replace(layout, distributed=False), 0).weights
    assert real["optimizer"] != 12 * real["trained"] // layout.shards


def _parameters(real: dict[str, Any], skip: str = "never") -> int:
    return sum(prod(shape) for name, shape, _ in chain(*real["shapes"]) if not re.search(skip, name))


def test_presets_have_the_sizes_of_the_paper(built):
    """Design, section 2: 8 experts 37.6 B, top-4 active 20.3 B; the pair 11.6 B with one expert of 4.33 B."""
    by_mode = {case[0]: real[0] for case, real in zip(CASES, built, strict=True) if case[1].world == 1}
    mixture, pair = by_mode["moe"], by_mode["expert"]
    assert _work("moe").model.top_k == 4 and _work("moe").model.num_experts == 8
    # 8 SwiGLU experts, 4 attention matrices, 4 norms and a router per layer; embedding, head and the last norm.
    layer = 8 * 3 * 4096 * 11008 + 4 * 4096**2 + 4 * 4096 + 8 * 4096
    assert _parameters(mixture) == 32 * layer + 2 * 100352 * 4096 + 4096
    assert round(_parameters(mixture) / 1e9, 1) == 37.6
    # Any four of the eight experts work on a token.
    assert round(_parameters(mixture, r"local_experts\.[4-7]\.") / 1e9, 1) == 20.3
    assert round(_parameters(pair) / 1e9, 1) == 11.6
    assert round(pair["trained"] / 1e9, 2) == 4.33
    assert pair["trained"] + pair["frozen"] == _parameters(pair)
