"""Starting a process: torch.distributed, Megatron's process groups and random states, on CUDA or on the CPU."""

import logging
import os
import warnings
from datetime import timedelta

import torch

from flexolmo_megatron.config.layout import process_problems
from flexolmo_megatron.config.train import ParallelConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.runtime.versions import check_versions


def local_device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def prepare() -> None:
    """Import Megatron-core, on the CPU runtime where there is no CUDA; to be called before any other import of it.

    Raises:
        FlexOlmoError: a package is missing or has a version that was not tested.
    """
    check_versions()
    with warnings.catch_warnings():  # upstream warns at import about each optional CUDA package that it does without
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            from flexolmo_megatron.runtime.cpu import enable_cpu_runtime

            enable_cpu_runtime()
        import megatron.core.models.backends
        import megatron.core.optimizer  # noqa: F401
        from megatron.core.transformer.moe import moe_utils
    if not hasattr(moe_utils, "te_general_gemm"):  # NameError upstream without TE in 0.16.1; fixed in 0.17
        moe_utils.te_general_gemm = None
    # Megatron asks on every layer whether a pair is a kind of MLP that it knows; it then builds it all the same.
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
        lambda record: not record.getMessage().startswith("Unknown MLP type")
    )


def initialize(
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_pipeline: int = 1,
    context_parallel: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int | None = None,
    seed: int = 1234,
    timeout_minutes: int = 60,
) -> None:
    """Make this process ready to build Megatron modules; calling it again with the same layout does nothing.

    Under torchrun (RANK and WORLD_SIZE set) all processes join one group; elsewhere the process is a world of one.

    Args:
        tensor_parallel: processes that share every layer's matrices.
        pipeline_parallel: processes that share the layers.
        virtual_pipeline: groups of layers per pipeline process.
        context_parallel: processes that share a sequence.
        expert_parallel: processes that share a layer's experts.
        expert_tensor_parallel: processes that share an expert's matrices; None for as many as tensor_parallel.
        seed: for Megatron's random states (dropout; initial weights that nobody replaces).
        timeout_minutes: how long a process waits for others before it gives up.

    Raises:
        FlexOlmoError: the layout does not fit the number of processes, or a package has a version that was not tested.
    """
    layout = ParallelConfig(
        tensor=tensor_parallel,
        pipeline=pipeline_parallel,
        virtual_pipeline=virtual_pipeline,
        context=context_parallel,
        expert=expert_parallel,
        expert_tensor=expert_tensor_parallel or tensor_parallel,
    )
    for problem in process_problems(layout, world_size()):
        raise FlexOlmoError(problem)
    prepare()
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))

    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as megatron_tensor_parallel

    if not torch.distributed.is_initialized():
        backend = "nccl" if on_cuda else "gloo"
        if "RANK" in os.environ:
            _join(backend, timedelta(minutes=timeout_minutes))
        else:
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if parallel_state.model_parallel_is_initialized():
        present = _present_layout()
        if present != layout:
            raise RuntimeError(f"process groups exist for {present}, not for {layout}")
    else:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel,
            pipeline_model_parallel_size=pipeline_parallel,
            virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
            context_parallel_size=context_parallel,
            expert_model_parallel_size=expert_parallel,
            expert_tensor_parallel_size=layout.expert_tensor,
            distributed_timeout_minutes=timeout_minutes,
        )
        megatron_tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _join(backend: str, timeout: timedelta) -> None:
    """Join the group of all processes of a launch, also where torchrun has started them again.

    torchrun (2.13) keeps its store over restarts, with the addresses of processes that have ended. On one node all
    count restarts alike, so a prefix tells them apart; on several, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's
    environment gives every restart a store of its own.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1" or "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
        return
    store, rank, size = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch.distributed.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)


def world_size() -> int:
    """Number of processes of this launch, before or after torch.distributed is ready."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _present_layout() -> ParallelConfig:
    """The layout of Megatron's process groups."""
    from megatron.core import parallel_state

    return ParallelConfig(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        context=parallel_state.get_context_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_world_size(),
    )
