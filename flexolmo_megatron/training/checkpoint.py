"""Checkpoints of a run: Megatron's dist_checkpointing in `checkpoints/step_00000100`, complete or absent.

Only what trains is stored: of an expert run the owner's tensors and their optimizer state; the anchor is named by its
path and digest in the card.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from flexolmo_megatron.config.card import CARD_FILE, ModelCard
from flexolmo_megatron.convert.model import CHECKPOINTS
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import sweep_folder, temporary_path
from flexolmo_megatron.model.mean_drift import MeanDrift, drifts
from flexolmo_megatron.runtime.ranks import on_first_rank, together
from flexolmo_megatron.training.checkpoint_writer import CheckpointWriter
from flexolmo_megatron.training.integrity import damage
from flexolmo_megatron.training.optimization import parts
from flexolmo_megatron.training.optimizer_shares import sharded_param_state
from flexolmo_megatron.training.optimizer_state import put_back_groups, take_out_groups

STEP_FOLDER = re.compile(r"step_(\d{8})")
_SWEPT = re.compile(rf"(damaged_)?{STEP_FOLDER.pattern}")

PROGRESS = ("step", "consumed_samples", "tokens", "skipped", "skipped_in_a_row")
"""Fields of ``TrainingState`` that are plain numbers."""

FAILURES = (CheckpointException, CheckpointingException, OSError, RuntimeError, KeyError, EOFError)
"""What reading a checkpoint that does not fit raises; torch's CheckpointException is no Exception."""


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
    skipped: int = 0
    """Steps that changed no weight, since the loss or a gradient was not finite."""
    skipped_in_a_row: int = 0
    """How many of them are the last ones."""
    largest_own_gradient: Tensor | None = None
    """Of this rank's last backward pass; not saved."""


def all_step_folders(run: Path) -> list[Path]:
    """Folders of a run that are named as checkpoints, oldest first."""
    folder = run / CHECKPOINTS
    return sorted(path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)) if folder.is_dir() else []


def step_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in all_step_folders(run) if (path / CARD_FILE).is_file()]


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
        if missing := sorted(trainable - set(sharded)):
            raise RuntimeError(
                f"a checkpoint would not hold {missing[0]}, which trains: its module's sharded_state_dict has another "
                f"name for it"
            )
        models[f"model{index}"] = {name: tensor for name, tensor in sharded.items() if name in trainable}
    for part in parts(state.optimizer):
        if part.optimizer is not None and not is_loading:
            _begin_moments(part)  # where every step so far was skipped
        if isinstance(part, DistributedOptimizer):
            part.sharded_param_state_fully_reshardable = partial(sharded_param_state, part)
    optimizer = state.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    step = take_out_groups(optimizer)
    if found := drifts(state.chunks):
        models["mean_drift"] = {str(layer): _sharded_drift(layer, drift) for layer, drift in found.items()}
    return {
        **models,
        "optimizer_step": step,
        # What is loaded gets the structure of this run's optimizer; what is saved needs none (``optimizer_state.py``).
        "optimizer": optimizer if is_loading else dict(enumerate(nested_values(optimizer))),
        "scheduler": state.scheduler.state_dict(),
        "progress": {name: getattr(state, name) for name in PROGRESS},
    }


def _sharded_drift(layer: int, drift: MeanDrift) -> ShardedTensor:
    """Where a checkpoint has the drift of a layer, which all ranks of its stage share."""
    replica = 0, parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank(
        with_context_parallel=True)
    return ShardedTensor.from_rank_offsets(f"mean_drift.{layer}", drift.drift_h, replica_id=replica)


def begin_save(run: Path, state: TrainingState, card: ModelCard, *, background: bool, hashed: bool) -> CheckpointWriter:
    """Write a checkpoint of the current step, or begin to; it is there once ``finish_save`` has returned.

    Called by all ranks, as everything below.

    Args:
        run: folder of the run.
        state: what is saved.
        card: saved with it.
        background: let training go on while a thread of each rank writes from a copy in host memory.
        hashed: record the sha256 of tensor files.

    Raises:
        FlexOlmoError: it cannot be written (full disk); earlier checkpoints are untouched.
    """
    content = together(lambda: _sharded_state(state, is_loading=False))
    return CheckpointWriter(
        run / CHECKPOINTS / f"step_{state.step:08d}", content, card, background=background, hashed=hashed
    )


def finish_save(writer: CheckpointWriter, keep: int) -> Path:
    """Wait until a checkpoint is complete, give it its name, and delete all but the newest ``keep`` of the run.

    Raises:
        FlexOlmoError: it cannot be written; earlier checkpoints are untouched.
    """
    writer.finish()
    on_first_rank(lambda: _delete_all_but(writer.path.parent.parent, keep))
    return writer.path


def _delete_all_but(run: Path, keep: int) -> None:
    for old in step_folders(run)[:-keep]:
        _delete(old)


def _delete(folder: Path) -> None:
    """Remove a checkpoint; what cannot be removed now (on NFS, files that somebody reads) is left to a later launch's
    ``sweep``."""
    # Under another name first: a kill in between leaves no checkpoint with half of its files.
    going = temporary_path(folder)
    with suppress(OSError):
        folder.rename(going)
        shutil.rmtree(going)


def sweep(run: Path) -> list[str]:
    """Remove what killed processes left of checkpoints that they wrote or deleted; rank 0 alone."""
    return sweep_folder(run / CHECKPOINTS, _SWEPT)


@dataclass
class Found:
    """What a run can go on from."""

    path: Path | None
    """The newest checkpoint that is intact; None where the run has none yet."""
    damaged: dict[Path, str]
    """Newer ones that are not, and why."""


def find_intact(run: Path, hashed: bool) -> Found:
    """Look for the newest checkpoint that still holds what was written.

    Args:
        run: folder of the run.
        hashed: compare the sha256 of tensor files, too.

    Raises:
        FlexOlmoError: there are checkpoints, and all of them are damaged; or a later version of this package has
            written the newest.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(on_first_rank(lambda: all_step_folders(run))):
        problem = damage(path, hashed)
        if problem is None:
            return Found(path, damaged)
        damaged[path] = problem
    if damaged:
        raise FlexOlmoError(
            f"no checkpoint of {run} is intact: "
            + "; ".join(f"{path.name}: {problem}" for path, problem in damaged.items())
            + "; name a new folder (out), or remove them to begin again"
        )
    return Found(None, damaged)


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that the run can write the same steps again; rank 0 alone."""
    for path in damaged:
        aside = path.with_name(f"damaged_{path.name}")
        if aside.exists():
            _delete(aside)
        path.rename(aside)


def _begin_moments(part: MegatronOptimizer) -> None:
    """Give Adam the state of step 0 where it has none yet, as it does itself in its first step."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            if not part.optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                step = {"step": torch.tensor(0.0)} if USING_PYTORCH_OPTIMIZER else {}
                part.optimizer.state[parameter] = {**step, **moments}


@contextmanager
def _loading(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let upstream's optimizers load a checkpoint where a state is left out of it or torch's AdamW stands in for a
    fused Adam.

    Upstream's distributed optimizer (0.16.1) expects a master weight also of fp32 parameters. With AdamW it expects the
    state of step 0 to be there, forgets "step" when it copies moments, and gives all parameters one and the same tensor
    as "step".
    """
    used = [part for part in parts(optimizer) if part.optimizer is not None]
    for part in used:
        if USING_PYTORCH_OPTIMIZER:
            _begin_moments(part)
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = partial(_set_states, part)
    yield
    for state in (state for part in used for state in part.optimizer.state.values() if USING_PYTORCH_OPTIMIZER):
        state["step"] = state["step"].clone()


@torch.no_grad()
def _set_states(part: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
    as_it_is = part._get_main_param_and_optimizer_states(parameter)
    type(part)._set_main_param_and_optimizer_states(part, parameter, {**as_it_is, **tensors})


def _load(path: Path, state: TrainingState) -> dict[str, Any]:
    try:
        sharded = _sharded_state(state, is_loading=True)
        # Each data-parallel process reads its share and hands it on: storage is read once, not once by each of them.
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(path)),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        return dist_checkpointing.load(sharded, str(path), strategy, strict=StrictHandling.RAISE_ALL)
    except FAILURES as error:
        raise FlexOlmoError(f"{path} cannot be loaded into this run: {_cause(error)}") from error


def load(path: Path, state: TrainingState) -> None:
    """Restore weights, optimizer, schedule and progress from a checkpoint of the same kind of run. Called by all ranks.

    Raises:
        FlexOlmoError: the checkpoint is damaged or does not fit the run.
    """
    with _loading(state.optimizer):
        loaded = together(lambda: _load(path, state))
        for index, module in enumerate(unwrap_model(state.chunks)):
            module.load_state_dict(loaded[f"model{index}"], strict=False)
        loaded.setdefault("optimizer", {})  # where this rank has nothing of it
        put_back_groups(loaded["optimizer"], state.optimizer, loaded["optimizer_step"])
        state.optimizer.load_state_dict(loaded["optimizer"])
    for layer, drift in drifts(state.chunks).items():
        drift.drift_h.copy_(loaded["mean_drift"][str(layer)])
    state.scheduler.load_state_dict(loaded["scheduler"])
    for name, value in loaded["progress"].items():
        setattr(state, name, value)
