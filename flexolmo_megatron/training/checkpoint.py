"""Checkpoints of a run: Megatron's dist_checkpointing in `checkpoints/step_00000100`, complete or absent.

Only what trains is stored: of an expert run the owner's tensors and their optimizer state; the anchor is named by its
path and digest in the card.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from flexolmo_megatron.config.card import CARD_FILE, ModelCard
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_directory

STEP_FOLDER = re.compile(r"step_(\d{8})")

FAILURES = (CheckpointException, CheckpointingException, OSError, RuntimeError, KeyError, EOFError)
"""What reading or writing a damaged checkpoint raises; torch's CheckpointException is no Exception."""


def _cause(error: BaseException) -> str:
    """What went wrong on the first rank where something did, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass
class TrainingState:
    """Everything of a run that a checkpoint restores."""

    chunks: list[DistributedDataParallel]
    """This rank's model; one chunk without virtual pipeline stages."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences read by all data-parallel ranks together."""
    tokens: int = 0
    """Tokens trained on."""


def step_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and (path / CARD_FILE).is_file()
    )


def _metadata() -> dict[str, Any]:
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_state(state: TrainingState, is_loading: bool) -> dict[str, Any]:
    """The nested dictionary of ShardedTensors that describes, for this rank, what a checkpoint holds."""
    metadata = _metadata()
    models = {}
    for index, module in enumerate(unwrap_model(state.chunks)):
        trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        sharded = module.sharded_state_dict(metadata=metadata)
        models[f"model{index}"] = {name: tensor for name, tensor in sharded.items() if name in trainable}
    return {
        **models,
        "optimizer": state.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata),
        "scheduler": state.scheduler.state_dict(),
        "progress": {"step": state.step, "consumed_samples": state.consumed_samples, "tokens": state.tokens},
    }


def save(run: Path, state: TrainingState, card: ModelCard, keep: int) -> Path:
    """Write a checkpoint of the current step, then delete all but the newest ``keep``. Called by all ranks.

    Raises:
        FlexOlmoError: it cannot be written (full disk); earlier checkpoints are untouched.
    """
    path = run / "checkpoints" / f"step_{state.step:08d}"
    first = torch.distributed.get_rank() == 0
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(path) if first else nullcontext() as temporary:
        shared = [str(temporary)]
        torch.distributed.broadcast_object_list(shared, src=0)
        try:
            dist_checkpointing.save(_sharded_state(state, is_loading=False), shared[0])
        except FAILURES as error:
            raise FlexOlmoError(
                f"cannot write the checkpoint {path}: {_cause(error)}; earlier checkpoints are intact"
            ) from error
        if first:
            card.save(temporary)
    torch.distributed.barrier()
    if first:
        for old in step_folders(run)[:-keep]:
            shutil.rmtree(old)
    return path


@contextmanager
def _loading_torch_adamw(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let upstream's optimizers load a checkpoint where torch's AdamW stands in for a fused Adam.

    Upstream's distributed optimizer (0.16.1) expects the state of step 0 to be there, forgets AdamW's "step" when it
    copies moments, and gives all parameters one and the same tensor as "step".
    """
    parts = [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part.optimizer is not None]
    if not USING_PYTORCH_OPTIMIZER:
        yield
        return
    for part in parts:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = partial(_set_with_step, part)
    yield
    for part in parts:
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


@torch.no_grad()
def _set_with_step(part: DistributedOptimizer, model_parameter: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
    group, order = part.model_param_group_index_map[model_parameter]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    type(part)._set_main_param_and_optimizer_states(part, model_parameter, {**tensors, "step": state["step"]})


def load(path: Path, state: TrainingState) -> None:
    """Restore weights, optimizer, schedule and progress from a checkpoint of the same kind of run. Called by all ranks.

    Raises:
        FlexOlmoError: the checkpoint is damaged or does not fit the run.
    """
    with _loading_torch_adamw(state.optimizer):
        try:
            loaded = dist_checkpointing.load(
                _sharded_state(state, is_loading=True), str(path), strict=StrictHandling.RAISE_ALL
            )
        except FAILURES as error:
            raise FlexOlmoError(f"{path} cannot be loaded into this run: {_cause(error)}") from error
        for index, module in enumerate(unwrap_model(state.chunks)):
            module.load_state_dict(loaded[f"model{index}"], strict=False)
        state.optimizer.load_state_dict(loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    progress = loaded["progress"]
    state.step, state.consumed_samples, state.tokens = (
        progress["step"],
        progress["consumed_samples"],
        progress["tokens"],
    )
