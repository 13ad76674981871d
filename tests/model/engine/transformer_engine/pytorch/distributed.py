"""Names that Megatron imports; none is called."""

from contextlib import nullcontext as activation_recompute_forward  # noqa: F401


class CudaRNGStatesTracker:
    def reset(self) -> None:
        pass
