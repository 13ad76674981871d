"""A launch of Megatron-LM on a machine without CUDA, for tests: beyond the CPU runtime, what pretrain() asks of CUDA.

Megatron-LM refuses to start without CUDA, and compiles CUDA kernels of its legacy models at every start. Afterwards
the file that REPORT names says what had gradients.
"""

import gc
import json
import os
import sys
import types
from pathlib import Path

from flexolmo_megatron.integrations.megatron_lm.__main__ import find_tree, main
from flexolmo_megatron.runtime.setup import prepare


def pretend_cuda() -> None:
    """Let Megatron-LM believe in one CUDA device; to be called after ``prepare()``."""
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(major=8, minor=0)
    import megatron.legacy.fused_kernels

    megatron.legacy.fused_kernels.load = lambda args: None


def gradients() -> dict:
    """Names of the parameters with a gradient buffer, and the sizes of all buffers in numbers."""
    from megatron.core.distributed import DistributedDataParallel

    chunks = [found for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]
    names = [name for chunk in chunks for name, parameter in chunk.module.named_parameters()
             if hasattr(parameter, "main_grad")]
    return {"names": names, "numbers": sum(buffer.numel for chunk in chunks for buffer in chunk.buffers)}


if __name__ == "__main__":
    find_tree()
    prepare()
    pretend_cuda()
    status = main()
    if status == 0 and "REPORT" in os.environ and os.environ["RANK"] == "0":
        Path(os.environ["REPORT"]).write_text(json.dumps(gradients()))
    sys.exit(status)
