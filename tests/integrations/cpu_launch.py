"""A launch of Megatron-LM on a machine without CUDA, for tests: beyond the CPU runtime, what pretrain() asks of CUDA.

Megatron-LM refuses to start without CUDA, and compiles CUDA kernels of its legacy models at every start.
"""

import sys
import types

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


if __name__ == "__main__":
    find_tree()
    prepare()
    pretend_cuda()
    sys.exit(main())
