"""Counting the matrix products that a piece of work launches, in torch's profile of it."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KERNEL = re.compile(r"gemm|gemv|nvjet|xmma|cutlass", re.IGNORECASE)
"""Names of CUDA kernels that are matrix products: those of cuBLAS, cuBLASLt and CUTLASS."""
NOT_A_PRODUCT = re.compile(r"splitk.*reduce|flash|fmha|attention|attn|sdpa", re.IGNORECASE)
"""Among those, the second half of a product that was split, and core attention."""


@dataclass(frozen=True)
class GemmCount:
    """What was launched."""

    calls: int
    """Matrix products."""
    names: dict[str, int]
    """Kernel name, or `m x k x n` on the CPU, to how often."""
    flops: int | None
    """Operations, 2 m k n each; None on CUDA, where kernels do not tell their shapes."""


def is_product(kernel: str) -> bool:
    """Whether a CUDA kernel of this name is a matrix product other than core attention's."""
    return KERNEL.search(kernel) is not None and NOT_A_PRODUCT.search(kernel) is None


def count_gemms(work: Callable[[], object]) -> GemmCount:
    """Run ``work`` under torch's profiler and count its matrix products: kernels on CUDA, else calls of aten::mm.

    Core attention is not counted.
    """
    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities, record_shapes=not on_cuda) as recorded:
        work()
        if on_cuda:
            torch.cuda.synchronize()
    events = recorded.events()
    if on_cuda:
        # Not "is": torch makes a new object of this type for each event.
        names = Counter(e.name for e in events if e.device_type == DeviceType.CUDA and is_product(e.name))
        return GemmCount(names.total(), dict(names), None)
    shapes = [event.input_shapes for event in events if event.name == "aten::mm"]
    sizes = [(left[0], left[1], right[1]) for left, right in shapes]
    flops = sum(2 * m * k * n for m, k, n in sizes)
    return GemmCount(len(sizes), dict(Counter(f"{m} x {k} x {n}" for m, k, n in sizes)), flops)
