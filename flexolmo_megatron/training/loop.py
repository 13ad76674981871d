"""The training loop: steps through Megatron's schedule, validation, the log, and checkpoints."""

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import Tensor

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.errors import FlexOlmoError, StopRequested
from flexolmo_megatron.model.mean_drift import end_step
from flexolmo_megatron.runtime.ranks import on_first_rank, together
from flexolmo_megatron.training import checkpoint
from flexolmo_megatron.training.agreement import agree, agree_on_signal
from flexolmo_megatron.training.checkpoint import TrainingState
from flexolmo_megatron.training.checkpoint_writer import CheckpointWriter
from flexolmo_megatron.training.console import Bar, say
from flexolmo_megatron.training.datasets import Datasets
from flexolmo_megatron.training.freezing import FrozenMark
from flexolmo_megatron.training.memory import memory_report
from flexolmo_megatron.training.optimization import apply_gradients, gradient_norm
from flexolmo_megatron.training.passes import Passes
from flexolmo_megatron.training.run_log import RunLog
from flexolmo_megatron.training.signals import REQUEUE_FILE, StopSignals


class Loop:
    """One process's part of a run that is set up."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        card: ModelCard,
        datasets: Datasets,
        state: TrainingState,
        signals: StopSignals,
    ) -> None:
        self.config, self.run, self.card, self.datasets = config, run, card, datasets
        self.state, self.signals = state, signals
        self.saving: CheckpointWriter | None = None
        self.saved = state.step
        self.signal = 0
        self.passes = Passes(config, state.chunks)
        self.log: RunLog | None = None

    def _open_log(self) -> None:
        if torch.distributed.get_rank() == 0:
            self.log = RunLog(self.run, self.state.step)

    def train(self) -> Path:
        """Train up to the end of the run, or of this launch's part of it; returns the last checkpoint.

        Raises:
            FlexOlmoError: a full disk, or a loss that is no longer finite.
            StopRequested: a signal came; what was done up to then is saved.
            RuntimeError: a frozen parameter has changed (a defect of this package).
        """
        config, state = self.config, self.state
        last = min(config.train_iters, state.step + (config.stop_after or config.train_iters))
        if state.step >= last:
            say(f"{self.run} has all of its {config.train_iters} steps already")
            return checkpoint.step_folders(self.run)[-1]
        together(self._open_log)
        get_moe_layer_wise_logging_tracker().clear()  # a run that broke off before in this process has left its sums
        began, bar = state.step, Bar(config.train_iters, state.step)
        try:
            self.signal = agree_on_signal(self.signals.received)  # one that came while the run was starting
            if not self.signal:
                self._steps(last, bar)
        finally:
            bar.close()
            if self.saving is not None:
                self.saving.abandon()
            if self.log is not None:
                self.log.close()
        together(self._check_log)
        if state.step < config.train_iters and self.signal:
            name = signal.Signals(self.signal).name
            on_first_rank(lambda: (self.run / REQUEUE_FILE).write_text(f"{name} at step {state.step}\n"))
            done = (
                f"stopped after step {state.step} of {config.train_iters}, which is saved"
                if state.step > began
                else f"stopped before step {state.step + 1} of {config.train_iters}, with nothing new to save"
            )
            raise StopRequested(f"{name}: {done}; the same command goes on from there")
        return checkpoint.step_folders(self.run)[-1]

    def _steps(self, last: int, bar: Bar) -> None:
        """Train up to and with step ``last``, or until a signal comes; with a checkpoint at the end."""
        config, state = self.config, self.state
        frozen = FrozenMark(state.chunks)
        iterators = self.passes.iterators(self.datasets.train, state.consumed_samples)
        reported = False
        while state.step < last and not self.signal:
            row = self._step(iterators)
            if not reported:
                say(str(memory_report(state.chunks, state.optimizer)))
                reported = True
            final = state.step == config.train_iters
            if self.datasets.valid is not None and (
                final or (config.eval_interval and state.step % config.eval_interval == 0)
            ):
                row["valid_loss"] = self._validate()
            self._report(row, bar, final)
            ends = state.step == last or self.signal
            if config.save_interval and state.step % config.save_interval == 0 and not ends:
                self._save()
        if state.step == last:  # after a signal every second counts; a launch that comes to its end checks
            together(lambda: self._check_frozen(frozen))
        if self.saved < state.step:
            self._save()
        self._finish_saving()

    def _step(self, iterators: list[Iterator]) -> dict[str, Any]:
        """One step of all ranks: weights and optimizer change on all of them, or on none."""
        config, state = self.config, self.state
        began = time.perf_counter()
        for chunk in state.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        lr = state.scheduler.get_lr({})  # of parameters without a rate of their own
        loss, own_loss, anchor_kl = self.passes.run(iterators, forward_only=False)
        norm = gradient_norm(state.optimizer)
        agreed = agree(
            signal=self.signals.received,
            own_loss=own_loss,
            own_gradients=state.largest_own_gradient,
            norm=norm,
            writing=self.saving is not None and self.saving.writing,
            log_failed=self.log is not None and self.log.failure is not None,
        )
        if agreed.log_failed:
            together(self._check_log)
        if self.saving is not None and not agreed.writing:
            self._finish_saving()
        self.signal = agreed.signal
        tokens = config.global_batch_size * config.data.seq_length
        if agreed.problem is None:
            apply_gradients(state.optimizer, norm)
            state.tokens += tokens
            state.skipped_in_a_row = 0
        if config.expert.drift_coeff:
            end_step(state.chunks, counts=agreed.problem is None)
        # The schedule and the data go on over a skipped step, so that both end with the run.
        state.scheduler.step(1)
        state.step += 1
        state.consumed_samples += config.global_batch_size
        row = {"step": state.step, "loss": loss, "grad_norm": norm, "lr": lr}
        if agreed.problem is not None:
            self._skip(agreed.problem)
            row["skipped"] = agreed.problem
        if anchor_kl is not None:
            row["anchor_kl"] = anchor_kl
        tracker = get_moe_layer_wise_logging_tracker()
        for name in sorted(tracker):
            row[name] = self._mean_router_loss(tracker[name]["values"])
        tracker.clear()
        row["tokens_per_second"] = tokens / (time.perf_counter() - began)
        return row

    def _skip(self, problem: str) -> None:
        """Count a step that has changed nothing; too many in a row end the run."""
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= self.config.max_skipped_steps:
            raise FlexOlmoError(
                f"step {state.step}: {problem}, which makes {state.skipped_in_a_row} such steps in a row "
                f"(max_skipped_steps = {self.config.max_skipped_steps}); lower optimizer.lr = "
                f"{self.config.optimizer.lr} or check the data; the last checkpoint is intact"
            )
        say(f"step {state.step} is skipped: {problem} ({state.skipped} of this run so far)")

    def _mean_router_loss(self, values_L: Tensor) -> float:
        """Mean over layers, microbatches and ranks of a router loss without its coefficient; each stage has its
        layers."""
        total = values_L.sum() / (len(values_L) * self.passes.microbatches)
        torch.distributed.all_reduce(total)
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        return (total * stages / torch.distributed.get_world_size()).item()

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss over ``eval_iters`` global batches, the same ones each time."""
        for chunk in self.state.chunks:
            chunk.eval()
        iterators = self.passes.iterators(self.datasets.valid, 0)
        losses = [self.passes.run(iterators, forward_only=True).loss for _ in range(self.config.eval_iters)]
        return sum(losses) / len(losses)

    def _report(self, row: dict[str, Any], bar: Bar, final: bool) -> None:
        if self.log is None:
            return
        self.log.write(row)
        bar.advance()
        if row["step"] % self.config.log_interval == 0 or final or "valid_loss" in row:
            valid = f", valid loss {row['valid_loss']:.4f}" if "valid_loss" in row else ""
            say(
                f"step {row['step']}/{self.config.train_iters}: loss {row['loss']:.4f}, grad norm "
                f"{row['grad_norm']:.3f}, lr {row['lr']:.2e}, {row['tokens_per_second']:,.0f} tokens/s{valid}"
            )

    def _check_log(self) -> None:
        if self.log is not None and self.log.failure is not None:
            raise FlexOlmoError(f"step {self.state.step}: {self.log.failure}")

    def _save(self) -> None:
        """Save this step, in the background where the configuration says so."""
        self._finish_saving()
        training = {
            "tokens": self.state.tokens,
            "steps": self.state.step,
            "lr": self.config.optimizer.lr,
            "seed": self.config.seed,
        }
        self.saving = checkpoint.begin_save(
            self.run,
            self.state,
            replace(self.card, training=training),
            background=self.config.async_save,
            hashed=self.config.checkpoint_hash,
        )
        self.saved = self.state.step
        if not self.config.async_save:
            self._finish_saving()

    def _finish_saving(self) -> None:
        """Make the checkpoint complete that is being written, if there is one."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            say(f"saved {checkpoint.finish_save(saving, self.config.keep)}")

    def _check_frozen(self, frozen: FrozenMark) -> None:
        frozen.check()
        if self.card.kind == "pair":
            say(f"frozen parameters unchanged, bit by bit; anchor digest {self.card.anchor_digest}")
        if self.card.kind == "router":
            digest = self.card.merged_digest
            say(f"all but router rows and biases unchanged, bit by bit; merged model's digest {digest}")
