"""Megatron-Bridge 0.3 on a machine without CUDA, for trying things out and for tests; on a GPU nothing of this is used.

Bridge imports Transformer Engine, which without CUDA cannot be installed, and its trainer refuses to start.
"""

import sys
import types
from functools import partial

import torch

from flexolmo_megatron.runtime.setup import prepare


def enable() -> None:
    """Let Bridge be imported and train on the CPU; to be called before any import of it."""
    prepare()
    import flexolmo_megatron.model.builder  # noqa: F401  all of megatron.core that models need: it finds no engine now
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ops"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__getattr__ = _missing
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    from megatron.bridge.training import initialize, setup

    torch.cuda.device_count = lambda: 1  # else it seeds no random states
    initialize.compile_helpers = lambda: None  # for data sets: they come compiled, and their Makefile not at all
    setup.initialize_megatron = partial(setup.initialize_megatron, allow_no_cuda=True)


def _missing(name: str) -> type:
    """Any class of Transformer Engine: only for ``isinstance`` and as a base, since nothing here is made of it."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (torch.nn.Module,), {})
