"""The training loop: Megatron's schedule, optimizer and DDP around the model that ``start`` built."""

import json
import math
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flexolmo_megatron.config.load import load_config, save_config
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.router import PairRouter
from flexolmo_megatron.runtime.setup import initialize, local_device, world_size
from flexolmo_megatron.training import checkpoint
from flexolmo_megatron.training.checkpoint import TrainingState
from flexolmo_megatron.training.datasets import Datasets, batches, build_datasets, parse_blend
from flexolmo_megatron.training.freezing import frozen_fingerprint
from flexolmo_megatron.training.memory import memory_report
from flexolmo_megatron.training.optimization import build_optimizer, build_scheduler
from flexolmo_megatron.training.resume import check_same_card
from flexolmo_megatron.training.start import Mode, Start, plan, start
from flexolmo_megatron.training.tokenizer import load_tokenizer


def train(mode: Mode, config: TrainConfig) -> Path:
    """Run, or resume, a training run; called by all processes of the launch.

    Args:
        mode: anchor (a new dense model), expert (an owner's), dense or moe (baselines: joint training).
        config: everything else; saved as ``config.yaml`` in the run's folder.

    Returns:
        The last checkpoint.

    Raises:
        FlexOlmoError: bad input, or a loss that is no longer finite.
        RuntimeError: a frozen parameter has changed (a defect of this package).
    """
    planned = plan(mode, config, world_size())
    initialize(
        tensor_parallel=config.parallel.tensor,
        pipeline_parallel=config.parallel.pipeline,
        virtual_pipeline=config.parallel.virtual_pipeline,
        context_parallel=config.parallel.context,
        expert_parallel=config.parallel.expert,
        expert_tensor_parallel=config.parallel.expert_tensor,
        seed=config.seed,
    )
    run = Path(config.out)
    _claim(run, mode, config)
    begun = start(planned, config)
    datasets = _datasets(config, run, begun)
    state = _training_state(config, begun)
    existing = checkpoint.step_folders(run)
    if existing:
        check_same_card(existing[-1], begun.card)
        checkpoint.load(existing[-1], state)
        _say(f"resuming from {existing[-1]} at step {state.step}")
    return _Run(mode, config, run, begun, datasets, state).train()


def _say(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        tqdm.write(text)


def _claim(run: Path, mode: Mode, config: TrainConfig) -> None:
    """Make the run's folder, or check that it is a run of the same kind."""
    if torch.distributed.get_rank() == 0:
        mark = run / "mode"
        if run.exists() and not mark.is_file() and (not run.is_dir() or any(run.iterdir())):
            raise FlexOlmoError(f"out = {run} is a folder with other things in it; name a new folder")
        if mark.is_file() and mark.read_text().strip() != mode:
            raise FlexOlmoError(
                f"out = {run} holds a run of `train {mark.read_text().strip()}`, not of `train {mode}`; name a new "
                f"folder"
            )
        if checkpoint.step_folders(run) and (run / "config.yaml").is_file():
            _check_same_samples(load_config(TrainConfig, paths=[str(run / "config.yaml")]), config)
        try:
            run.mkdir(parents=True, exist_ok=True)
            mark.write_text(mode + "\n")
        except OSError as error:
            raise FlexOlmoError(f"out = {run} cannot be made: {error.strerror}") from error
        save_config(config, run / "config.yaml")
    torch.distributed.barrier()


def _check_same_samples(before: TrainConfig, now: TrainConfig) -> None:
    """Megatron draws the order of samples anew for another number of them: a run can only go on with the same one."""
    for name in ("train_iters", "global_batch_size", "seed"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise FlexOlmoError(
                f"{name} = {new}: the run in {now.out} began with {old} and can only be resumed with that"
            )
    for name in ("train", "public", "public_share", "seq_length"):
        old, new = getattr(before.data, name), getattr(now.data, name)
        if old != new:
            raise FlexOlmoError(
                f"data.{name} = {new}: the run in {now.out} began with {old} and can only be resumed with that"
            )


def _datasets(config: TrainConfig, run: Path, begun: Start) -> Datasets:
    tokenizer = load_tokenizer(begun.card.tokenizer)
    return build_datasets(
        train=_blend(config),
        valid=config.data.valid or None,
        sequence_length=config.data.seq_length,
        seed=config.seed,
        train_samples=config.train_iters * config.global_batch_size,
        valid_samples=config.eval_iters * config.global_batch_size,
        tokenizer=tokenizer,
        vocab_size=begun.card.model.vocab_size,
        cache_dir=config.data.cache or run / "cache",
    )


def _blend(config: TrainConfig) -> list[str | float]:
    """The owner's data and its share of public data as one weighted blend, the owner's prefixes first."""
    prefixes, weights = parse_blend(config.data.train, "data.train")
    if not config.data.public:
        return config.data.train
    public, public_weights = parse_blend(config.data.public, "data.public")
    blend: list[str | float] = []
    for names, given, share in (
        (prefixes, weights, 1 - config.data.public_share),
        (public, public_weights, config.data.public_share),
    ):
        given = given or [1.0] * len(names)
        for name, weight in zip(names, given, strict=True):
            blend += [share * weight / sum(given), name]
    return blend


def _training_state(config: TrainConfig, begun: Start) -> TrainingState:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream warns that it falls back to torch's AdamW without TE and apex
        optimizer = build_optimizer(config, begun.chunks)
    # Upstream's schedule cannot set it again where a backward pass outside of a schedule has set it in this process.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    megatron_config = get_model_config(begun.chunks[0])
    megatron_config.grad_scale_func = optimizer.scale_loss
    megatron_config.finalize_model_grads_func = finalize_model_grads
    no_sync = [chunk.no_sync for chunk in begun.chunks]
    megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return TrainingState(begun.chunks, optimizer, build_scheduler(config, optimizer))


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the token losses `[b, s]`; Megatron's schedule divides by the number of tokens."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.to(torch.int), {"loss": torch.stack([total.detach(), tokens])}


def _forward_step(
    own_prefixes: int, iterator: Iterator[dict[str, Tensor]], model: DistributedDataParallel
) -> tuple[Tensor, Any]:
    """One microbatch. Where own_prefixes is above 0, samples of the first so many data sets are the owner's."""
    batch = {name: value.to(local_device()) for name, value in next(iterator).items() if value is not None}
    if own_prefixes:
        for module in model.modules():
            if isinstance(module, PairRouter):
                module.own_B = batch["dataset_id"] < own_prefixes if model.training else None
    own = get_batch_on_this_cp_rank({name: batch[name] for name in ("tokens", "position_ids", "labels", "loss_mask")})
    losses = model(own["tokens"], own["position_ids"], None, labels=own["labels"])
    return losses, lambda output: _loss(own["loss_mask"], output)


class _Run:
    """One process's part of a run."""

    def __init__(
        self, mode: Mode, config: TrainConfig, run: Path, begun: Start, datasets: Datasets, state: TrainingState
    ) -> None:
        self.mode, self.config, self.run, self.card, self.datasets, self.state = (
            mode,
            config,
            run,
            begun.card,
            datasets,
            state,
        )
        self.data_parallel = parallel_state.get_data_parallel_world_size()
        self.microbatches = config.global_batch_size // (config.micro_batch_size * self.data_parallel)
        self.first = torch.distributed.get_rank() == 0
        self.forward_backward = get_forward_backward_func()
        own_prefixes = len(parse_blend(config.data.train)[0]) if config.expert.domain_loss_coeff else 0
        self.forward_step = partial(_forward_step, own_prefixes)
        self.tensorboard = SummaryWriter(str(run / "tensorboard")) if self.first else None
        self.metrics: IO[str] | None = self._open_metrics() if self.first else None

    def _open_metrics(self) -> IO[str]:
        """Open metrics.jsonl for appending, without lines of steps that will be done again."""
        path = self.run / "metrics.jsonl"
        if path.exists():
            kept = [
                line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= self.state.step
            ]
            path.write_text("".join(f"{line}\n" for line in kept))
        return open(path, "a", buffering=1)

    def _iterators(self, dataset: Any, consumed_samples: int) -> list[Iterator[dict[str, Tensor]]]:
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
            for _ in self.state.chunks
        ]

    def _pass(self, iterators: list[Iterator], forward_only: bool) -> float:
        """Run one global batch; returns the mean loss per token in nats (on every rank)."""
        reports = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=iterators,
            model=self.state.chunks,
            num_microbatches=self.microbatches,
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.micro_batch_size,
            forward_only=forward_only,
        )
        totals = torch.zeros(2, dtype=torch.float64, device=local_device())
        for report in reports:  # empty except on the last pipeline stage
            totals += report["loss"]
        torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        torch.distributed.broadcast(
            totals,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        return (totals[0] / totals[1]).item()

    def train(self) -> Path:
        config, state = self.config, self.state
        fingerprints = [frozen_fingerprint(chunk) for chunk in state.chunks]
        iterators = self._iterators(self.datasets.train, state.consumed_samples)
        last = min(config.train_iters, state.step + (config.stop_after or config.train_iters))
        if state.step >= last:
            _say(f"{self.run} has all of its {config.train_iters} steps already")
            return checkpoint.step_folders(self.run)[-1]
        bar = tqdm(total=config.train_iters, initial=state.step, unit="step", disable=None if self.first else True)
        reported = False
        saved = state.step
        while state.step < last:
            row = self._step(iterators)
            if not reported:
                _say(str(memory_report(state.chunks, state.optimizer)))
                reported = True
            final = state.step == config.train_iters
            if self.datasets.valid is not None and (
                final or (config.eval_interval and state.step % config.eval_interval == 0)
            ):
                row["valid_loss"] = self._validate()
            self._report(row, bar, final)
            if (config.save_interval and state.step % config.save_interval == 0) or state.step == last:
                self._save()
                saved = state.step
        bar.close()
        assert saved == state.step
        self._check_frozen(fingerprints)
        if self.tensorboard:
            self.tensorboard.close()
            self.metrics.close()
        return checkpoint.step_folders(self.run)[-1]

    def _step(self, iterators: list[Iterator]) -> dict[str, Any]:
        config, state = self.config, self.state
        began = time.perf_counter()
        for chunk in state.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        lr = state.scheduler.get_lr({})  # of parameters without a rate of their own
        loss = self._pass(iterators, forward_only=False)
        if not math.isfinite(loss):
            raise FlexOlmoError(
                f"step {state.step + 1}: the loss is {loss}; lower optimizer.lr = {config.optimizer.lr} or check "
                f"the data; "
                "the last checkpoint is intact"
            )
        _, grad_norm, _ = state.optimizer.step()
        if not math.isfinite(grad_norm or 0.0):
            raise FlexOlmoError(
                f"step {state.step + 1}: the gradient norm is {float(grad_norm)}; lower optimizer.lr = "
                f"{config.optimizer.lr} or check the data; the last checkpoint is intact"
            )
        state.scheduler.step(1)
        state.step += 1
        state.consumed_samples += config.global_batch_size
        tokens = config.global_batch_size * config.data.seq_length
        state.tokens += tokens
        row = {
            "step": state.step,
            "loss": loss,
            "grad_norm": float(grad_norm or 0.0),
            "lr": lr,
            "tokens_per_second": tokens / (time.perf_counter() - began),
        }
        tracker = get_moe_layer_wise_logging_tracker()
        for name in sorted(tracker):
            row[name] = self._mean_router_loss(tracker[name]["values"])
        tracker.clear()
        return row

    def _mean_router_loss(self, values_L: Tensor) -> float:
        """Mean over layers, microbatches and ranks of a router loss without its coefficient; each stage has its
        layers."""
        total = values_L.sum() / (len(values_L) * self.microbatches)
        torch.distributed.all_reduce(total)
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        return (total * stages / torch.distributed.get_world_size()).item()

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss over ``eval_iters`` global batches, the same ones each time."""
        for chunk in self.state.chunks:
            chunk.eval()
        iterators = self._iterators(self.datasets.valid, 0)
        losses = [self._pass(iterators, forward_only=True) for _ in range(self.config.eval_iters)]
        return sum(losses) / len(losses)

    def _report(self, row: dict[str, Any], bar: tqdm, final: bool) -> None:
        if not self.first:
            return
        self.metrics.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self.tensorboard.add_scalar(name, value, row["step"])
        bar.update(1)
        if row["step"] % self.config.log_interval == 0 or final or "valid_loss" in row:
            valid = f", valid loss {row['valid_loss']:.4f}" if "valid_loss" in row else ""
            tqdm.write(
                f"step {row['step']}/{self.config.train_iters}: loss {row['loss']:.4f}, grad norm "
                f"{row['grad_norm']:.3f}, "
                f"lr {row['lr']:.2e}, {row['tokens_per_second']:,.0f} tokens/s{valid}"
            )

    def _save(self) -> None:
        self.card.training = {
            "tokens": self.state.tokens,
            "steps": self.state.step,
            "lr": self.config.optimizer.lr,
            "seed": self.config.seed,
        }
        path = checkpoint.save(self.run, self.state, self.card, self.config.keep)
        _say(f"saved {path}")

    def _check_frozen(self, before: list[str]) -> None:
        after = [frozen_fingerprint(chunk) for chunk in self.state.chunks]
        if after != before:
            raise RuntimeError(f"a frozen parameter has changed on rank {torch.distributed.get_rank()}")
        if self.mode == "expert" and self.card.kind == "pair":
            _say(f"frozen parameters unchanged, bit by bit; anchor digest {self.card.anchor_digest}")
