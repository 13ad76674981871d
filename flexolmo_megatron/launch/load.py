"""Reading and checking a launch: what is wrong is said before anything waits in a queue."""

import math
import re
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from operator import attrgetter
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flexolmo_megatron.config.card import check_expert_name
from flexolmo_megatron.config.layout import data_parallel_size
from flexolmo_megatron.config.load import load_config, merge, parse_override, read_yaml, reason
from flexolmo_megatron.config.train import RouterTrainConfig, TrainConfig
from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.launch.config import (
    AnchorJob,
    ExpertsJob,
    LaunchConfig,
    RouterJob,
    SlurmConfig,
    given_options,
    training_of,
)

TIME = re.compile(r"(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+:\d{1,2}(:\d{1,2})?|UNLIMITED|INFINITE)")
OPTION = re.compile(r"[a-z][a-z0-9-]*")
TAKEN = {
    "account": "slurm.account", "partition": "slurm.partition", "qos": "slurm.qos", "time": "slurm.time",
    "nodes": "slurm.nodes", "gpus-per-node": "slurm.gpus_per_node", "ntasks-per-node": "slurm.tasks_per_node",
    "cpus-per-task": "slurm.cpus_per_task", "signal": "slurm.warn_seconds", "gpus-per-task": "slurm.gpus_per_node",
    **dict.fromkeys(("array", "chdir", "clusters", "dependency", "error", "export", "job-name", "kill-on-bad-exit",
                     "kill-on-invalid-dep", "no-requeue", "ntasks", "open-mode", "output", "requeue", "wait")),
}
"""Options of sbatch and srun that have a place of their own here, or that the scripts need as they are (None)."""


def load_launch(path: str, overrides: Sequence[str] = ()) -> LaunchConfig:
    """Read and check a launch.

    Args:
        path: the YAML file.
        overrides: ``dotted.key=value`` strings.

    Raises:
        FlexOlmoError: an unknown key (the nearest valid one is offered), a value of a wrong type, a missing or
            impossible one, or options that `flexolmo train` would refuse.
    """
    values = read_yaml(path, "the YAML file of a launch")
    for override in overrides:
        values = merge(values, parse_override(LaunchConfig, override), "the command line")
    config = _checked(LaunchConfig, values, path)
    _check(config, path)
    return config


def _checked(schema: type, values: DictConfig, where: str) -> Any:
    """An instance of ``schema``, after a search for keys that it does not have."""
    reject_unknown(schema, OmegaConf.to_container(values), where, "")
    try:
        return OmegaConf.to_object(merge(OmegaConf.structured(schema), values, where))
    except MissingMandatoryValue as error:
        raise FlexOlmoError(f"{where}: {error.full_key} has no value") from None
    except OmegaConfBaseException as error:
        raise FlexOlmoError(reason(where, error)) from None


def reject_unknown(schema: type, values: Any, where: str, prefix: str) -> None:
    """Search what a YAML file holds for keys that ``schema`` does not have, also below names that the user chooses.

    Raises:
        FlexOlmoError: there is one; the nearest valid key is offered.
    """
    if not isinstance(values, dict):
        return
    hints = get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            raise FlexOlmoError(f"{where}: unknown option {f'{prefix}{key}'!r}{nearest(str(key), hints)}")
        hint = hints[key]
        if get_origin(hint) in (Union, UnionType):
            hint = get_args(hint)[0]
        if is_dataclass(hint):
            reject_unknown(hint, value, where, f"{prefix}{key}.")
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]) and isinstance(value, dict):
            for name, inner in value.items():
                reject_unknown(get_args(hint)[1], inner, where, f"{prefix}{key}.{name}.")
        elif key == "slurm":
            reject_unknown(SlurmConfig, value, where, f"{prefix}slurm.")
        elif key == "time" and isinstance(value, int):
            raise FlexOlmoError(f"{where}: {prefix}time = {value}: expected text in quotes, as '12:00:00' (without "
                                "quotes, YAML takes it for a number)")


def job_slurm(config: LaunchConfig, stage: str) -> SlurmConfig:
    """What the job ``stage`` (anchor, experts, merge or router) asks for: the section slurm, then its own.

    Raises:
        FlexOlmoError: a value of a wrong type, or an impossible one.
    """
    base = config.slurm
    if stage == "merge":
        base = replace(base, nodes=1, tasks_per_node=1, gpus_per_node=min(1, base.gpus_per_node))
    try:
        own = OmegaConf.create(getattr(config, stage).slurm)
        slurm = OmegaConf.to_object(merge(OmegaConf.structured(base), own, ""))
    except OmegaConfBaseException as error:
        raise FlexOlmoError(f"{stage}.slurm.{reason('', error)}") from None
    except FlexOlmoError as error:
        raise FlexOlmoError(f"{stage}.slurm.{error}") from None
    check_slurm(slurm, stage)
    return slurm


def check_slurm(slurm: SlurmConfig, stage: str) -> None:
    """Check what a job asks for.

    Raises:
        FlexOlmoError: an impossible value, which the message names, with ``stage``.
    """
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1), ("cpus_per_task", 1),
                        ("warn_seconds", 1), ("requeues", 0)):
        value = getattr(slurm, name)
        if value is not None and value < least:
            raise FlexOlmoError(f"slurm.{name} = {value} (job {stage}): expected at least {least}")
    if slurm.time is not None:
        if not TIME.fullmatch(slurm.time):
            raise FlexOlmoError(f"slurm.time = {slurm.time!r} (job {stage}): expected hours:minutes:seconds or "
                                "days-hours:minutes:seconds")
        if _seconds(slurm.time) <= 2 * slurm.warn_seconds:
            raise FlexOlmoError(f"slurm.time = {slurm.time!r} (job {stage}) is {_seconds(slurm.time):g} s: expected "
                                f"more than twice slurm.warn_seconds = {slurm.warn_seconds}, which leave no time to "
                                "train")
    for name in ("account", "partition", "qos"):
        _check_value(f"slurm.{name}", getattr(slurm, name))
    for section in ("options", "srun_options"):
        for name, value in getattr(slurm, section).items():
            if not isinstance(name, str) or not OPTION.fullmatch(name):
                raise FlexOlmoError(f"slurm.{section}: {name!r} is not the long name of an option without its dashes")
            if name in TAKEN:
                instead = f"{TAKEN[name]} instead" if TAKEN[name] else "no such option, the scripts set it"
                raise FlexOlmoError(f"slurm.{section}.{name}: expected {instead}")
            _check_value(f"slurm.{section}.{name}", value)


def _seconds(time: str) -> float:
    """Of a time limit as Slurm reads it: days-hours:minutes:seconds, hours:minutes:seconds or minutes:seconds."""
    if not time[0].isdigit():
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [*parts, 0, 0][:3] if dash or len(parts) == 3 else [0, *parts]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, dict | list):
        raise FlexOlmoError(f"{name} = {value}: expected one value")
    if isinstance(value, str) and (not value or re.search(r"[\"\\\n]", value)):
        raise FlexOlmoError(f"{name} = {value!r}: expected text without quotation marks, backslashes and line ends")


def _check(config: LaunchConfig, path: str) -> None:
    """Check what no single field shows, and every training configuration: an error now is cheaper than in the queue."""
    if not re.fullmatch(r"[^%\"\\\n]+", config.out):  # Slurm expands % in the names of logs
        raise FlexOlmoError(f"{path}: out = {config.out!r}: expected a path without %, quotation marks and backslashes")
    stages = [stage for stage in ("anchor", "experts", "merge", "router") if getattr(config, stage) is not None]
    if not stages:
        raise FlexOlmoError(f"{path}: expected at least one of the sections anchor, experts and merge")
    for stage in stages:
        job_slurm(config, stage)
    if (config.anchor is None) == (config.published is None):
        raise FlexOlmoError(f"{path}: expected either a section anchor or published=, the anchor that there is")
    if config.anchor:
        if not config.anchor.documents:
            raise FlexOlmoError(f"{path}: anchor.documents is empty: expected the files that the public router row is "
                                "made of")
        _check_training(config, "anchor", "", f"{path}: anchor")
    if config.experts:
        _check_experts(config, config.experts, path)
    if config.merge and not config.experts and not config.merge.packages:
        raise FlexOlmoError(f"{path}: merge.packages is empty and there is no section experts: nothing to merge")
    if config.router:
        _check_router(config, path)


def _check_router(config: LaunchConfig, path: str) -> None:
    if config.merge is None:
        raise FlexOlmoError(f"{path}: there is a section router and no section merge, whose model it tunes")
    training = _check_training(config, "router", "", f"{path}: router")
    if not training.data.proxies:
        raise FlexOlmoError(f"{path}: router: data.proxies is empty: expected proxies of at least one owner, as "
                            "data.proxies.NAME=[PREFIX]")
    if config.experts and not config.merge.packages:
        for name in training.data.proxies:
            if name not in config.experts.each:
                raise FlexOlmoError(f"{path}: router: data.proxies.{name}: there is no such expert"
                                    f"{nearest(name, config.experts.each)}")


def _check_experts(config: LaunchConfig, experts: ExpertsJob, path: str) -> None:
    if not experts.each:
        raise FlexOlmoError(f"{path}: experts.each is empty: expected at least one expert")
    for name, expert in experts.each.items():
        check_expert_name(name)
        if bool(expert.documents) == (expert.domain_vector is not None):
            raise FlexOlmoError(f"{path}: experts.each.{name}: expected either documents or domain_vector")
        _check_training(config, "experts", name, f"{path}: experts.each.{name}")


def training_config(config: LaunchConfig, stage: str, expert: str = "") -> TrainConfig:
    """What `flexolmo train` will read in a job, every option that its script adds included.

    Args:
        config: the launch.
        stage: anchor, experts or router.
        expert: name of the expert in the job experts.

    Raises:
        FlexOlmoError: an option that there is not, or a value of a wrong type.
    """
    job: AnchorJob | ExpertsJob | RouterJob = getattr(config, stage)
    if isinstance(job, ExpertsJob):
        job = training_of(job, job.each[expert])
    schema = RouterTrainConfig if isinstance(job, RouterJob) else TrainConfig
    overrides = [*job.options, *(f"{key}={value}" for key, value in given_options(config, stage, expert).items())]
    return load_config(schema, preset=job.preset, paths=job.config, overrides=overrides)


def _check_training(config: LaunchConfig, stage: str, expert: str, where: str) -> TrainConfig:
    """Check what `flexolmo train` will check, as far as that needs no model."""
    slurm = job_slurm(config, stage)
    try:
        training = training_config(config, stage, expert)
        training.validate(data_parallel_size(training.parallel, slurm.nodes * slurm.processes_per_node))
    except FlexOlmoError as error:
        raise FlexOlmoError(f"{where}: {error}") from None
    for key, value in given_options(config, stage, expert).items():
        if attrgetter(key)(training) != value:  # ${…}, which would be looked up
            raise FlexOlmoError(f"{where}: {key} = {value!r} would be read as {attrgetter(key)(training)!r}: choose "
                                "other names")
    if training.stop_after is not None:
        raise FlexOlmoError(f"{where}: stop_after = {training.stop_after}: a job ends by its time limit and goes on "
                            "after a requeue; leave stop_after out")
    return training
