"""Megatron-core on a machine without CUDA, over gloo: stand-ins for what upstream takes from ``torch.cuda``.

Switched on by ``enable_cpu_runtime()`` alone, never by importing, and only where CUDA is missing. It does not make
CUDA-only features work (Transformer Engine, fused kernels, CUDA graphs); those are refused by ``runtime/setup.py``.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from flexolmo_megatron.runtime.gloo import allow_unequal_parts

_CPU = torch.device("cpu")


class _Nothing:
    """A stream or event where everything is synchronous: waiting, recording and synchronising do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., "_Nothing"]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def _is_cuda(device: Any) -> bool:
    # An integer device is a CUDA ordinal.
    if isinstance(device, bool):
        return False
    return isinstance(device, int) or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))


class _CudaMeansCpu(TorchFunctionMode):
    """Sends tensors meant for CUDA to the CPU, and reports CPU tensors' types as the CUDA ones upstream compares
    with."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):  # for a fast copy to the GPU
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _CpuGenerators:
    """``torch.cuda.default_generators`` for any index: the CPU generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _leave_uncompiled(function: Callable | None = None, **options: Any) -> Callable:
    return function or _leave_uncompiled


def _replace_cuda_functions() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    # A function object each: torch.compile's tables, which other packages may import later, refuse shared ones.
    for name in ("set_device", "synchronize", "empty_cache", "ipc_collect"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)
    cuda.Stream = cuda.Event = _Nothing
    cuda.current_stream = lambda device=None: _Nothing()
    cuda.default_stream = lambda device=None: _Nothing()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    # torch.manual_seed calls torch.cuda.manual_seed_all, so only the first is given a meaning here.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    cuda.default_generators = _CpuGenerators()


@functools.cache
def enable_cpu_runtime() -> None:
    """Let Megatron-core run on the CPU for the rest of this process; calling it again does nothing.

    Raises:
        RuntimeError: CUDA is available, so nothing must be replaced.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU runtime is for machines without CUDA")
    # Upstream compiles small functions for CUDA's sake; on the CPU that only costs a compiler run for each.
    torch.compile = _leave_uncompiled
    if "megatron.core" in sys.modules:  # too late for that, but not for running the compiled ones as they are
        torch._dynamo.config.disable = True
    _replace_cuda_functions()
    allow_unequal_parts()
    _CudaMeansCpu().__enter__()

    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    megatron_random._lazy_call = lambda callback: callback()

    # all_to_all needs split sizes as lists; upstream converts them only where they are CUDA tensors.
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    upstream_synchronize = dispatcher._maybe_dtoh_and_synchronize

    @functools.wraps(upstream_synchronize)
    def synchronize(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor:
        tokens_per_expert = upstream_synchronize(self, point, tokens_per_expert)
        for name in ("input_splits", "output_splits"):
            splits = getattr(self, name, None)
            if isinstance(splits, torch.Tensor):
                setattr(self, name, splits.tolist())
        return tokens_per_expert

    dispatcher._maybe_dtoh_and_synchronize = synchronize
