"""NeMo-Run recipes with the paper's settings: ``nemo llm pretrain --factory flexolmo_expert``, or ``run.run`` them.

Each returns a ``run.Partial`` of ``llm.pretrain``, any field of which may be changed, as of NeMo's own recipes:
``recipe.trainer.strategy.tensor_model_parallel_size = 4``.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import nemo_run as run
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections.llm import pretrain
from nemo.collections.llm.recipes.log.default import default_log, default_resume
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

from flexolmo_megatron.config.train import RouterTrainConfig, TrainConfig
from flexolmo_megatron.integrations.nemo.config import PAPER, FlexOlmoConfig, FlexOlmoConfig7x7B, FlexOlmoConfigPair
from flexolmo_megatron.integrations.nemo.data import FlexOlmoData
from flexolmo_megatron.integrations.nemo.model import FlexOlmoModel, FlexOlmoOptimizer
from flexolmo_megatron.training.optimization import optimizer_config


@run.cli.factory(target=pretrain, name="flexolmo_anchor")
def flexolmo_anchor(paths: list[str] = ["data/public"], dir: str = "runs", name: str = "flexolmo_anchor",  # noqa: B006
                    num_nodes: int = 1, num_gpus_per_node: int = 8) -> run.Partial:
    """A new 7B anchor on public data.

    Args:
        paths: prefixes of .bin/.idx files from `flexolmo data`.
        dir, name: the run's checkpoints and logs go to DIR/NAME; an existing run is resumed.
        num_nodes, num_gpus_per_node: devices.
    """
    return _recipe(run.Config(FlexOlmoConfig), paths, {}, PAPER, dir, name, num_nodes, num_gpus_per_node)


@run.cli.factory(target=pretrain, name="flexolmo_expert")
def flexolmo_expert(anchor: str = "anchor", expert: str = "expert", domain_vector: str = "expert.npz",
                    paths: list[str] = ["data/expert"], dir: str = "runs", name: str = "flexolmo_expert",  # noqa: B006
                    num_nodes: int = 1, num_gpus_per_node: int = 8) -> run.Partial:
    """An owner's run: one expert against the frozen anchor, whose sizes it takes.

    Args:
        anchor: the published anchor.
        expert: name of the owner's expert.
        domain_vector: from `flexolmo embed`.
        paths, dir, name, num_nodes, num_gpus_per_node: see ``flexolmo_anchor``.
    """
    config = run.Config(FlexOlmoConfigPair, start_from=anchor, expert=expert, domain_vector=domain_vector)
    return _recipe(config, paths, {}, PAPER, dir, name, num_nodes, num_gpus_per_node)


@run.cli.factory(target=pretrain, name="flexolmo_router")
def flexolmo_router(merged: str = "merged", paths: list[str] = ["data/public"],  # noqa: B006
                    proxies: dict[str, list[str]] = {"expert": ["data/expert_proxies"]},  # noqa: B006
                    dir: str = "runs", name: str = "flexolmo_router", num_nodes: int = 1,
                    num_gpus_per_node: int = 8) -> run.Partial:
    """Tuning of a merged model's router; nothing but its rows and biases trains.

    Args:
        merged: the merged model.
        paths: public data.
        proxies: data of each owner's proxies, by the name of the expert.
        dir, name, num_nodes, num_gpus_per_node: see ``flexolmo_anchor``.
    """
    config = run.Config(FlexOlmoConfig7x7B, start_from=merged, proxies=sorted(proxies), moe_z_loss_coeff=None)
    optimizer = replace(RouterTrainConfig(out=".").optimizer, use_distributed_optimizer=True)
    settings = replace(PAPER, optimizer=optimizer, train_iters=PAPER.train_iters // 10)
    return _recipe(config, paths, proxies, settings, dir, name, num_nodes, num_gpus_per_node)


def _recipe(config: run.Config, paths: list[str], proxies: dict[str, Any], settings: TrainConfig, dir: str, name: str,
            num_nodes: int, num_gpus_per_node: int) -> run.Partial:
    chosen, length = settings.optimizer, settings.data.seq_length
    config.seq_length = length
    optimizer = optimizer_config(settings, partial(run.Config, OptimizerConfig))
    schedule = run.Config(CosineAnnealingScheduler, warmup_steps=chosen.lr_warmup_iters, min_lr=chosen.min_lr)
    strategy = run.Config(
        nl.MegatronStrategy, ckpt_async_save=False,  # NeMo's needs a module that core 0.16 no longer has
        ddp=run.Config(DistributedDataParallelConfig, grad_reduce_in_fp32=True))
    trainer = run.Config(
        nl.Trainer, accelerator="gpu", devices=num_gpus_per_node, num_nodes=num_nodes, strategy=strategy,
        max_steps=settings.train_iters, limit_val_batches=0, log_every_n_steps=10, use_distributed_sampler=False,
        num_sanity_val_steps=0, plugins=run.Config(nl.MegatronMixedPrecision, precision="bf16-mixed"))
    data = run.Config(
        FlexOlmoData, paths=paths, proxies=proxies, seq_length=length, micro_batch_size=settings.micro_batch_size,
        global_batch_size=settings.global_batch_size, cache=f"{dir}/{name}/cache")
    log = default_log(dir=dir, name=name)
    log.ckpt.filename = "{step}"
    return run.Partial(
        pretrain, model=run.Config(FlexOlmoModel, config=config), trainer=trainer, data=data, log=log,
        optim=run.Config(FlexOlmoOptimizer, config=optimizer, lr_scheduler=schedule), resume=default_resume())
