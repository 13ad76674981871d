"""What a run holds in memory for weights, gradients and optimizer state, counted from the live tensors."""

from dataclasses import dataclass
from itertools import chain

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from flexolmo_megatron.model.engine import stored_tensors
from flexolmo_megatron.training.optimization import parts


@dataclass(frozen=True)
class MemoryReport:
    """Sizes on this rank."""

    trainable_parameters: int
    frozen_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    def __str__(self) -> str:
        return (
            f"trainable parameters {self.trainable_parameters:,}, frozen {self.frozen_parameters:,}; "
            f"weights {self.weight_bytes:,} B, gradients {self.gradient_bytes:,} B, optimizer state "
            f"{self.optimizer_bytes:,} B"
        )


def _bytes(tensors: list[Tensor]) -> int:
    # Views share storage (parameters in a DDP buffer, master weights in a shard), so each storage counts once. Its
    # address in memory would not do: storages on the meta device, of a model that is only planned, have none.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def optimizer_tensors(optimizer: MegatronOptimizer) -> list[Tensor]:
    """All tensors of an optimizer: moments, and master weights where they are not the model's own."""
    tensors = []
    for part in parts(optimizer):
        if part.optimizer is None:  # nothing to optimise on this rank
            continue
        tensors += [
            value for state in part.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        tensors += chain.from_iterable(getattr(part, "fp32_from_float16_groups", []))
        tensors += [
            tensor
            for group in getattr(part, "shard_fp32_from_float16_groups", [])
            for tensor in group
            if isinstance(tensor, Tensor)
        ]
    return tensors


def memory_report(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> MemoryReport:
    """Count after the first step, when the optimizer has made its state."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    stray = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return MemoryReport(
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        frozen_parameters=sum(p.numel() for p in parameters if not p.requires_grad),
        weight_bytes=_bytes([tensor for parameter in parameters for tensor in stored_tensors(parameter)]),
        gradient_bytes=_bytes([buffer.grad_data for buffer in buffers] + stray),
        optimizer_bytes=_bytes(optimizer_tensors(optimizer)),
    )
