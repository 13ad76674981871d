"""A training run, and the runs that tune a router: set up, or resumed, and handed to the loop."""

import gc
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.utils import get_model_config

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.errors import StopRequested
from flexolmo_megatron.model.router import forget_router_gradients, hold_biases_at_zero
from flexolmo_megatron.runtime.ranks import on_first_rank, together
from flexolmo_megatron.runtime.setup import initialize, world_size
from flexolmo_megatron.training import checkpoint
from flexolmo_megatron.training.agreement import largest_gradient
from flexolmo_megatron.training.checkpoint import TrainingState
from flexolmo_megatron.training.console import say
from flexolmo_megatron.training.datasets import Datasets, build_datasets, parse_blend
from flexolmo_megatron.training.loop import Loop
from flexolmo_megatron.training.optimization import build_optimizer, build_scheduler
from flexolmo_megatron.training.planning import Mode, plan
from flexolmo_megatron.training.resume import check_same_card
from flexolmo_megatron.training.router_run import row_set_runs, write_tuned_model
from flexolmo_megatron.training.run_folder import check_folder, claim
from flexolmo_megatron.training.run_plan import Plan
from flexolmo_megatron.training.signals import REQUEUE_FILE, StopSignals
from flexolmo_megatron.training.start import Start, start
from flexolmo_megatron.training.tokenizer import load_tokenizer


def train(mode: Mode, config: TrainConfig) -> Path:
    """Run, or resume, a training run; called by all processes of the launch.

    Args:
        mode: anchor (a new dense model), expert (an owner's), dense or moe (baselines: joint training), router.
        config: everything else; saved as ``config.yaml`` in the run's folder.

    Returns:
        The last checkpoint.

    Raises:
        FlexOlmoError: bad input, a full disk, or a loss that is no longer finite.
        StopRequested: a signal came; what was done up to then is saved.
        RuntimeError: a frozen parameter has changed (a defect of this package).
    """
    with StopSignals() as signals:
        planned = plan(mode, config, world_size())
        initialize(
            tensor_parallel=config.parallel.tensor,
            pipeline_parallel=config.parallel.pipeline,
            virtual_pipeline=config.parallel.virtual_pipeline,
            context_parallel=config.parallel.context,
            expert_parallel=config.parallel.expert,
            expert_tensor_parallel=config.parallel.expert_tensor,
            seed=config.seed,
            timeout_minutes=config.distributed_timeout_minutes,
        )
        return (_tune_router if mode == "router" else _train)(mode, config, planned, signals)


def _train(mode: Mode, config: TrainConfig, planned: Plan, signals: StopSignals) -> Path:
    run = Path(config.out)
    inputs = on_first_rank(lambda: check_folder(run, mode, config))
    found = checkpoint.find_intact(run, config.checkpoint_hash)
    begun = together(lambda: start(planned, config, resumes=found.path is not None))
    datasets = run_datasets(config, begun.card)
    state = together(lambda: _training_state(config, begun))
    if found.path is not None:
        on_first_rank(lambda: check_same_card(found.path, begun.card))
        checkpoint.load(found.path, state)
    on_first_rank(lambda: claim(run, mode, config, inputs, found))
    if found.path is not None:
        say(f"resuming from {found.path} at step {state.step}")
    return Loop(config, run, begun.card, datasets, state, signals).train()


def _tune_router(mode: Mode, config: TrainConfig, planned: Plan, signals: StopSignals) -> Path:
    """Tune each set of rows that is wanted, then write the tuned model."""
    run, left, checkpoints = Path(config.out), config.stop_after, []
    for part in row_set_runs(config, planned):
        if left == 0:
            return checkpoints[-1]
        say(f"router rows {part.plan.card.row_sets[0].name!r}, in {part.config.out}")
        before = part.steps
        try:
            checkpoints.append(_train(mode, replace(part.config, stop_after=left), part.plan, signals))
        except StopRequested:
            mark = Path(part.config.out, REQUEUE_FILE)
            on_first_rank(lambda mark=mark: (run / REQUEUE_FILE).write_text(mark.read_text()))
            raise
        gc.collect()  # modules and their hooks refer to one another
        left = left and left - (part.steps - before)
        if part.steps < config.train_iters:
            return checkpoints[-1]
    say(on_first_rank(lambda: write_tuned_model(planned.source, planned.card.merged_digest, checkpoints, run)))
    return checkpoints[0]


def run_datasets(config: TrainConfig, card: ModelCard) -> Datasets:
    """The samples of a run, in its order. Called by all ranks.

    Args:
        config: of the run.
        card: what it trains: names the tokenizer.
    """
    tokenizer = together(lambda: load_tokenizer(card.tokenizer))
    return build_datasets(
        train=_blend(config),
        valid=config.data.valid or None,
        sequence_length=config.data.seq_length,
        seed=config.seed,
        train_samples=config.train_iters * config.global_batch_size,
        valid_samples=config.eval_iters * config.global_batch_size,
        tokenizer=tokenizer,
        vocab_size=card.model.vocab_size,
        cache_dir=config.data.cache or Path(config.out, "cache"),
    )


def _blend(config: TrainConfig) -> list[str | float]:
    """All that is read as one weighted blend, data.train first: of an owner's run with its share of public data, of
    router tuning with equal shares of public data and of each owner's proxies."""
    data = config.data
    sources = [("data.train", data.train, 1 - data.public_share)]
    if data.public:
        sources.append(("data.public", data.public, data.public_share))
    sources += [(f"data.proxies.{name}", prefixes, 1.0) for name, prefixes in data.proxies.items()]
    if len(sources) == 1:
        return data.train
    blend: list[str | float] = []
    for what, source, share in sources:
        prefixes, weights = parse_blend(source, what)
        weights = weights or [1.0] * len(prefixes)
        for prefix, weight in zip(prefixes, weights, strict=True):
            blend += [share * weight / sum(weights) / sum(share for *_, share in sources), prefix]
    return blend


def _training_state(config: TrainConfig, begun: Start) -> TrainingState:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream warns that it falls back to torch's AdamW without TE and apex
        optimizer = build_optimizer(config, begun.chunks)
    # Upstream's schedule cannot set it again where a backward pass outside of a schedule has set it in this process.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    megatron_config = get_model_config(begun.chunks[0])
    megatron_config.grad_scale_func = optimizer.scale_loss
    state = TrainingState(begun.chunks, optimizer, build_scheduler(config, optimizer))
    megatron_config.finalize_model_grads_func = partial(
        _finalize_gradients, state, fixed_rows=config.optimizer.router_lr == 0
    )
    no_sync = [chunk.no_sync for chunk in begun.chunks]
    megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return state


def _finalize_gradients(
    state: TrainingState, chunks: list[DistributedDataParallel], *args: Any, fixed_rows: bool, **options: Any
) -> None:
    """What Megatron's schedule calls after the last backward pass; notes what this rank's own gradients were."""
    state.largest_own_gradient = largest_gradient(chunks)
    finalize_model_grads(chunks, *args, **options)
    for chunk in chunks:
        hold_biases_at_zero(chunk)
        if fixed_rows:
            forget_router_gradients(chunk)
