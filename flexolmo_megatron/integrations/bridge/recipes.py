"""Training in Megatron-Bridge's own trainer: recipes, with what ``flexolmo train`` starts from, freezes and reads.

Not covered: the options that ``_WITHOUT`` names, which are refused. ``checkpoint_hash`` and ``max_skipped_steps`` have
no effect: Bridge's trainer has checks of its own.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training import config as bridge
from megatron.bridge.training import pretrain as trainer
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.tokenizers.config import TokenizerConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_model_config

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.train import RouterTrainConfig, TrainConfig
from flexolmo_megatron.convert.model import newest_checkpoint, open_model
from flexolmo_megatron.convert.rows import untuned
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.integrations.bridge.models import FlexOlmoProvider, provider
from flexolmo_megatron.integrations.cards import check_checkpoints, write_cards
from flexolmo_megatron.model.router import hold_biases_at_zero
from flexolmo_megatron.runtime.ranks import on_first_rank
from flexolmo_megatron.runtime.setup import world_size
from flexolmo_megatron.training.freezing import FrozenMark
from flexolmo_megatron.training.optimization import optimizer_config
from flexolmo_megatron.training.planning import Mode, plan
from flexolmo_megatron.training.router_run import write_tuned_model
from flexolmo_megatron.training.run import run_datasets
from flexolmo_megatron.training.run_plan import Plan
from flexolmo_megatron.training.start import fill, run_settings

_WITHOUT = ("optimizer.router_lr", "expert.domain_loss_coeff", "expert.routing_noise", "expert.anchor_kl_coeff",
            "expert.drift_coeff", "fp8.recipe", "stop_after", "leave_one_out")
"""Options that must be what they are by default."""


def flexolmo_anchor(overrides: Sequence[str] = (), preset: str | None = None) -> bridge.ConfigContainer:
    """Recipe of a new dense anchor; see ``flexolmo_expert``."""
    return _recipe("anchor", overrides, preset)


def flexolmo_expert(overrides: Sequence[str] = (), preset: str | None = None) -> bridge.ConfigContainer:
    """Recipe of an owner's run: the pair with its frozen anchor. Train it with ``pretrain`` of this module.

    Args:
        overrides: options of ``flexolmo train expert``: ["anchor=anchor/", "expert.name=notes", …].
        preset: as ``flexolmo train --preset``.

    Returns:
        Bridge's configuration; any field but the architecture may be changed, as by its OmegaConf overrides.

    Raises:
        FlexOlmoError: as ``flexolmo train`` refuses, and for an option that a run in Bridge does not have.
    """
    return _recipe("expert", overrides, preset)


def flexolmo_router(overrides: Sequence[str] = (), preset: str | None = None) -> bridge.ConfigContainer:
    """Recipe of tuning a merged model's router, with all experts; see ``flexolmo_expert``.

    The tuned model is in the folder ``model`` of ``out`` when ``pretrain`` has come to the last step.
    """
    return _recipe("router", overrides, preset)


def _recipe(mode: Mode, overrides: Sequence[str], preset: str | None) -> bridge.ConfigContainer:
    schema = RouterTrainConfig if mode == "router" else TrainConfig
    config = load_config(schema, preset=preset, overrides=overrides)
    usual = TrainConfig()
    for name in _WITHOUT:
        if attrgetter(name)(config) != attrgetter(name)(usual):
            raise FlexOlmoError(f"{name} = {attrgetter(name)(config)}: not available in Megatron-Bridge; expected no "
                                "value, or `flexolmo train`")
    planned = plan(mode, config, world_size())
    settings = config.optimizer
    model = provider(
        planned.card,
        anchor_ffn_hidden_size=planned.anchor_ffn_hidden_size,
        seq_length=config.data.seq_length,
        flexolmo_merged=config.merged,
        **run_settings(config, planned.card.model_kind),
    )
    model.register_pre_wrap_hook(lambda chunks: _fill(chunks, model, planned, config))
    on_cuda = torch.cuda.is_available()
    return bridge.ConfigContainer(
        model=model,
        train=bridge.TrainingConfig(
            train_iters=config.train_iters,
            micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size,
            eval_interval=config.eval_interval or config.train_iters,
            eval_iters=config.eval_iters if config.data.valid else 0,
        ),
        optimizer=optimizer_config(config, bridge.OptimizerConfig),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style=settings.lr_decay_style,
            lr_warmup_iters=settings.lr_warmup_iters,
            lr_decay_iters=config.train_iters,
            lr_wsd_decay_iters=settings.lr_wsd_decay_iters or None,
            start_weight_decay=settings.weight_decay,
            end_weight_decay=settings.weight_decay,
        ),
        ddp=bridge.DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=settings.use_distributed_optimizer
        ),
        dataset=RunData(config, planned.card),
        logger=bridge.LoggerConfig(log_interval=config.log_interval),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=planned.card.model.vocab_size),
        checkpoint=bridge.CheckpointConfig(
            save=config.out, load=config.out, save_interval=config.save_interval or config.train_iters,
            most_recent_k=config.keep, async_save=config.async_save,
        ),
        rng=bridge.RNGConfig(seed=config.seed),
        dist=bridge.DistributedInitConfig(
            distributed_backend="nccl" if on_cuda else "gloo",
            distributed_timeout_minutes=config.distributed_timeout_minutes,
        ),
    )


def _fill(chunks: list[GPTModel], model: FlexOlmoProvider, planned: Plan, config: TrainConfig) -> list[GPTModel]:
    """Bridge's pre-wrap hook: weights, and what trains, before DDP and optimizer look."""
    fill(chunks, planned, config)
    model.flexolmo_card = planned.card.to_json()  # which the digest of the anchor or merged model is in now
    return chunks


class RunData(bridge.DatasetProvider):
    """The data of a run, checked and ordered as ``flexolmo train`` does.

    Args:
        config: of the run; no field, so that Bridge's overrides leave it as it is.
        card: what is trained.
    """

    def __init__(self, config: TrainConfig, card: ModelCard) -> None:
        super().__init__(dataloader_type="single", num_workers=0)
        self.config, self.card = config, card

    def build_datasets(self, context: bridge.DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Training and validation samples, as many as Bridge asks for; no test samples."""
        sized = replace(
            self.config, global_batch_size=1, train_iters=context.train_samples, eval_iters=context.valid_samples
        )
        return tuple(run_datasets(sized, self.card))


class _Run(Callback):
    """What Bridge's trainer has no configuration for: biases that stay at or below 0, and proof of the frozen bits."""

    frozen: FrozenMark | None = None
    """Made when training begins."""

    def on_train_start(self, context: CallbackContext) -> None:
        settings = get_model_config(context.model[0])
        finalize = settings.finalize_model_grads_func

        def finalize_and_hold(chunks: list[Any], *args: Any, **options: Any) -> None:
            finalize(chunks, *args, **options)
            for chunk in chunks:
                hold_biases_at_zero(chunk)

        settings.finalize_model_grads_func = finalize_and_hold
        self.frozen = FrozenMark(context.model)

    def on_train_end(self, context: CallbackContext) -> None:
        self.frozen.check()


def pretrain(container: bridge.ConfigContainer, callbacks: Sequence[Callback] = ()) -> None:
    """Bridge's ``pretrain`` of a container from this module's recipes; its checkpoints get cards.

    Raises:
        FlexOlmoError: the checkpoints to go on with belong to another run.
        RuntimeError: a frozen parameter has changed (a defect of this package).
        SystemExit: Bridge's way to stop before the last step.
    """
    folders, model, run, stopped = container.checkpoint, container.model, _Run(), None

    def check(chunks: list[GPTModel]) -> list[GPTModel]:
        on_first_rank(lambda: check_checkpoints(folders.save, folders.load, model.card))
        return chunks

    model.register_pre_wrap_hook(check)  # after the recipe's, in which the card has got its digest
    try:
        trainer.pretrain(container, forward_step, callbacks=[run, *callbacks])
    except SystemExit as stop:  # at exit_interval, a time limit or a signal, without a call of on_train_end
        if run.frozen is None:
            raise
        run.frozen.check()
        stopped = stop
    if folders.save and os.environ.get("RANK", "0") == "0":  # Bridge's process group is gone
        _finish(Path(folders.save), model, complete=stopped is None)
    if stopped is not None:
        raise stopped


def _finish(save: Path, model: FlexOlmoProvider, complete: bool) -> None:
    write_cards(save)
    if model.card.kind == "router" and complete:
        merged = untuned(open_model(model.flexolmo_merged))
        print(write_tuned_model(merged, model.card.merged_digest, [newest_checkpoint(save)], save))
