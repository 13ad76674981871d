"""Global batches through Megatron's schedule: one forward pass, or forward and backward, and the mean loss."""

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config
from torch import Tensor

from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.model.router import PairRouter
from flexolmo_megatron.runtime.setup import local_device
from flexolmo_megatron.training.anchor_kl import losses_and_divergence
from flexolmo_megatron.training.datasets import batches, parse_blend


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the token losses `[b, s]`; Megatron's schedule divides by the number of tokens."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.to(torch.int), {"loss": torch.stack([total.detach(), tokens])}


def _loss_with_divergence(
    loss_mask: Tensor, public_B: Tensor, coefficient: float, losses: Tensor, divergences: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same, with the divergence from the anchor, which is 0 on an owner's tokens; reported apart."""
    total, tokens, report = _loss(loss_mask, losses)
    divergence = (divergences * loss_mask).sum()
    report["anchor_kl"] = torch.stack([divergence.detach(), loss_mask[public_B].sum()])
    return total + coefficient * divergence, tokens, report


def routing_noise(tokens: Tensor, layers: int, seed: int) -> Tensor:
    """Draw standard normal noise `[b, layers]` for the sequences of tokens `[b, s]`.

    It depends on the seed and the sequence alone, so that it is the same under every layout and after a restart.
    """
    draws = []
    for sequence in tokens.cpu():
        digest = hashlib.sha256(f"routing noise {seed}".encode() + sequence.numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        draws.append(torch.randn(layers, generator=generator))
    return torch.stack(draws)


def _set_routers(config: TrainConfig, own_prefixes: int, batch: dict[str, Tensor], model: torch.nn.Module) -> None:
    """Tell the routers of a pair what they need to know of a microbatch beside its tokens."""
    own, noise = None, None
    if model.training and (config.expert.domain_loss_coeff or config.expert.drift_coeff):
        # A single data set is no blend, and has no numbers.
        own = (batch["dataset_id"] < own_prefixes if "dataset_id" in batch
               else torch.ones_like(batch["tokens"][:, 0], dtype=torch.bool))
    if model.training and config.expert.routing_noise:
        noise = routing_noise(batch["tokens"], get_model_config(model).num_layers, config.seed).to(local_device())
    for router in model.modules():
        if isinstance(router, PairRouter):
            router.own_B = own
            router.noise_B = None if noise is None else config.expert.routing_noise * noise[:, router.layer_number - 1]


def _forward_step(
    config: TrainConfig, own_prefixes: int, iterator: Iterator[dict[str, Tensor]], model: DistributedDataParallel
) -> tuple[Tensor, Any]:
    """One microbatch. Samples of the first own_prefixes data sets are the owner's."""
    batch = {name: value.to(local_device()) for name, value in next(iterator).items() if value is not None}
    if config.expert.domain_loss_coeff or config.expert.routing_noise or config.expert.drift_coeff:
        _set_routers(config, own_prefixes, batch, model)
    own = get_batch_on_this_cp_rank({name: batch[name] for name in ("tokens", "position_ids", "labels", "loss_mask")})
    coefficient = config.expert.anchor_kl_coeff if model.training else 0
    if coefficient and (public := batch["dataset_id"] >= own_prefixes).any():
        losses, divergences = losses_and_divergence(model, own, public)
        return losses, lambda output: _loss_with_divergence(own["loss_mask"], public, coefficient, output, divergences)
    losses = model(own["tokens"], own["position_ids"], None, labels=own["labels"])
    return losses, lambda output: _loss(own["loss_mask"], output)


class Result(NamedTuple):
    """What one global batch gave."""

    loss: float
    """Mean cross-entropy per token in nats, on every rank."""
    own_loss: Tensor
    """Sum of the token losses that this rank itself has seen (a scalar)."""
    anchor_kl: float | None
    """Mean over public tokens of the divergence from the anchor, in nats; None where none was computed."""


class Passes:
    """What one process does in every pass of a run."""

    def __init__(self, config: TrainConfig, chunks: list[DistributedDataParallel]) -> None:
        self.config, self.chunks = config, chunks
        self.data_parallel = parallel_state.get_data_parallel_world_size()
        self.microbatches = config.global_batch_size // (config.micro_batch_size * self.data_parallel)
        self.forward_backward = get_forward_backward_func()
        self.forward_step = partial(_forward_step, config, len(parse_blend(config.data.train)[0]))

    def iterators(self, dataset: Any, consumed_samples: int) -> list[Iterator[dict[str, Tensor]]]:
        """The microbatches of this rank, once for each of its virtual pipeline stages."""
        return [
            iter(
                batches(
                    dataset,
                    consumed_samples=consumed_samples,
                    micro_batch_size=self.config.micro_batch_size,
                    data_parallel_rank=parallel_state.get_data_parallel_rank(),
                    data_parallel_size=self.data_parallel,
                )
            )
            for _ in self.chunks
        ]

    def run(self, iterators: list[Iterator], forward_only: bool) -> Result:
        """Run one global batch."""
        reports = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=iterators,
            model=self.chunks,
            num_microbatches=self.microbatches,
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.micro_batch_size,
            forward_only=forward_only,
        )
        totals = torch.zeros(4, dtype=torch.float64, device=local_device())
        for report in reports:  # empty except on the last pipeline stage
            totals[:2] += report["loss"]
            if "anchor_kl" in report:
                totals[2:] += report["anchor_kl"]
        own_loss = totals[0].clone()
        torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        torch.distributed.broadcast(
            totals,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        loss, tokens, divergence, public = totals.tolist()
        return Result(loss / tokens, own_loss, divergence / public if public else None)
