"""The same logits each time, to the last bit, also on a GPU."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fixed_order() -> Iterator[None]:
    """Let CUDA add up the outputs of a token's experts in one and the same order within the block.

    Megatron's unfused kernel (moe_utils.unpermute, 0.16.1) adds them in any order unless torch is asked for
    deterministic algorithms: from three experts on, the same input could give other last bits.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch warns of every product
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
