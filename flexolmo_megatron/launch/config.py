"""The YAML file of `flexolmo launch`: which jobs there are, and what each asks of Slurm."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.exchange.manifest import check_expert_name


@dataclass
class SlurmConfig:
    """What a job asks for. Nothing here has a default that only some clusters know."""

    account: str | None = None
    """sbatch --account."""
    partition: str | None = None
    """sbatch --partition."""
    qos: str | None = None
    """sbatch --qos."""
    time: str | None = None
    """Time limit in quotes, as '12:00:00' or '2-00:00:00' (days-hours); by default the partition's. A longer training
    run requeues itself."""
    nodes: int = 1
    """Nodes of the job (of each expert's job)."""
    gpus_per_node: int = 0
    """GPUs on each node; 0 to train on processors."""
    tasks_per_node: int | None = None
    """Training processes on each node; by default one per GPU, or one."""
    cpus_per_task: int | None = None
    """Processors of each training process; by default Slurm's, which is 1."""
    warn_seconds: int = 300
    """Seconds before the time limit at which training is told to save and to stop. A checkpoint must take less."""
    requeues: int = 50
    """How often a job may put itself back into the queue."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before anything else, for example module load, source .venv/bin/activate, export NCCL_…."""
    python: str = "python"
    """Command that starts Python; with a container for example apptainer exec --nv image.sif python."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch, for example {mem: 0, exclusive: true, constraint: a100}."""
    srun_options: dict[str, Any] = field(default_factory=dict)
    """Options of every srun, for example {container-image: image.sqsh}."""


@dataclass
class AnchorJob:
    """Trains the public anchor and publishes it."""

    documents: list[str] = MISSING
    """Public documents whose mean embedding is the public router row: files, or patterns such as public/*.jsonl."""
    preset: str | None = None
    """As for `flexolmo train`."""
    config: list[str] = field(default_factory=list)
    """YAML files for `flexolmo train --config`."""
    options: list[str] = field(default_factory=list)
    """KEY=VALUE options for `flexolmo train`, after the files."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """What this job asks for otherwise than the section slurm."""


@dataclass
class Expert:
    """One owner's expert: what differs from the others."""

    documents: list[str] = field(default_factory=list)
    """Documents that the domain vector is made of. Needed unless domain_vector."""
    domain_vector: str | None = None
    """File from `flexolmo embed`, where it is there already."""
    config: list[str] = field(default_factory=list)
    """YAML files for `flexolmo train --config`, after those of all experts."""
    options: list[str] = field(default_factory=list)
    """KEY=VALUE options, after those of all experts; at least data.train."""
    owner: str = ""
    """For the package: who hands it over."""
    licence: str = ""
    """For the package: what may be done with it."""
    contact: str = ""
    """For the package: whom to ask."""


@dataclass
class ExpertsJob:
    """Trains all experts at once, one array task each, and packs them."""

    each: dict[str, Expert] = MISSING
    """Name of each expert, and what differs from the others."""
    preset: str | None = None
    """As for `flexolmo train`."""
    config: list[str] = field(default_factory=list)
    """YAML files for `flexolmo train --config`, for all experts."""
    options: list[str] = field(default_factory=list)
    """KEY=VALUE options for `flexolmo train`, for all experts."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """What each of these jobs asks for otherwise than the section slurm."""


@dataclass
class MergeJob:
    """Merges the experts, and evaluates."""

    packages: list[str] = field(default_factory=list)
    """Packages beside those of `experts`."""
    domains: dict[str, list[str]] = field(default_factory=dict)
    """Documents of each domain to evaluate on; none for no evaluation."""
    merge_arguments: list[str] = field(default_factory=list)
    """Further words for `flexolmo merge`, for example [--top-k, 4]."""
    eval_arguments: list[str] = field(default_factory=list)
    """Further words for `flexolmo eval`, for example [--max-bytes, 1000000]."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """What this job asks for otherwise than the section slurm; without more it is one node, one process and, if the
    others have GPUs, one GPU."""


@dataclass
class LaunchConfig:
    """`flexolmo launch CONFIG.yaml`."""

    out: str = MISSING
    """Folder of everything that the jobs make, with their scripts and logs."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What all jobs ask for."""
    published: str | None = None
    """Published anchor, where there is no job `anchor` that makes one."""
    embed_arguments: list[str] = field(default_factory=list)
    """Further words for every `flexolmo embed`, for example [--embedder, NAME]."""
    anchor: AnchorJob | None = None
    """Section of the job that trains and publishes the anchor; none to start from `published`."""
    experts: ExpertsJob | None = None
    """Section of the array job that trains the experts."""
    merge: MergeJob | None = None
    """Section of the job that merges and evaluates."""


TIME = re.compile(r"(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+:\d{1,2}(:\d{1,2})?|UNLIMITED|INFINITE)")
OPTION = re.compile(r"[a-z][a-z0-9-]*")
TAKEN = {
    "account": "slurm.account", "partition": "slurm.partition", "qos": "slurm.qos", "time": "slurm.time",
    "nodes": "slurm.nodes", "gpus-per-node": "slurm.gpus_per_node", "ntasks-per-node": "slurm.tasks_per_node",
    "cpus-per-task": "slurm.cpus_per_task", "signal": "slurm.warn_seconds",
    **dict.fromkeys(("array", "chdir", "dependency", "error", "job-name", "kill-on-bad-exit", "kill-on-invalid-dep",
                     "no-requeue", "ntasks", "open-mode", "output", "requeue", "wait")),
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
    if not Path(path).is_file():
        raise FlexOlmoError(f"{path} does not exist; expected the YAML file of a launch")
    try:
        values = OmegaConf.load(path)
    except Exception as error:  # yaml raises a family of errors that share no base with OmegaConf's
        raise FlexOlmoError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig):
        raise FlexOlmoError(f"{path}: expected a mapping of options at the top")
    for override in overrides:
        if "=" not in override:
            raise FlexOlmoError(f"{override!r}: expected an override of the form key=value")
        values = OmegaConf.merge(values, OmegaConf.from_dotlist([override]))
    config = _checked(LaunchConfig, values, path)
    _check(config, path)
    return config


def _checked(schema: type, values: DictConfig, where: str) -> Any:
    """An instance of ``schema``, after a search for keys that it does not have."""
    _reject_unknown(schema, OmegaConf.to_container(values), where, "")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except MissingMandatoryValue as error:
        raise FlexOlmoError(f"{where}: {error.full_key} has no value") from None
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise FlexOlmoError(": ".join(filter(None, [where, error.full_key, reason]))) from None


def _reject_unknown(schema: type, values: Any, where: str, prefix: str) -> None:
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
            _reject_unknown(hint, value, where, f"{prefix}{key}.")
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]) and isinstance(value, dict):
            for name, inner in value.items():
                _reject_unknown(get_args(hint)[1], inner, where, f"{prefix}{key}.{name}.")
        elif key == "slurm":
            _reject_unknown(SlurmConfig, value, where, f"{prefix}slurm.")
        elif key == "time" and isinstance(value, int):
            raise FlexOlmoError(f"{where}: {prefix}time = {value}: expected text in quotes, as '12:00:00' (without "
                                "quotes, YAML takes it for a number)")


def job_slurm(config: LaunchConfig, stage: str) -> SlurmConfig:
    """What the job ``stage`` (anchor, experts or merge) asks for: the section slurm, then its own.

    Raises:
        FlexOlmoError: a value of a wrong type, or an impossible one.
    """
    base = config.slurm
    if stage == "merge":
        base = replace(base, nodes=1, tasks_per_node=1, gpus_per_node=min(1, base.gpus_per_node))
    values = OmegaConf.merge(OmegaConf.structured(base), OmegaConf.create())
    try:
        slurm = OmegaConf.to_object(OmegaConf.merge(values, OmegaConf.create(getattr(config, stage).slurm)))
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise FlexOlmoError(f"{stage}.slurm.{error.full_key}: {reason}") from None
    _check_slurm(slurm, stage)
    return slurm


def _check_slurm(slurm: SlurmConfig, stage: str) -> None:
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1), ("cpus_per_task", 1),
                        ("warn_seconds", 1), ("requeues", 0)):
        value = getattr(slurm, name)
        if value is not None and value < least:
            raise FlexOlmoError(f"slurm.{name} = {value} (job {stage}): expected at least {least}")
    if slurm.time is not None and not TIME.fullmatch(slurm.time):
        raise FlexOlmoError(f"slurm.time = {slurm.time!r} (job {stage}): expected hours:minutes:seconds or "
                            "days-hours:minutes:seconds")
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


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, dict | list):
        raise FlexOlmoError(f"{name} = {value}: expected one value")
    if isinstance(value, str) and (not value or re.search(r"[\"\\\n]", value)):
        raise FlexOlmoError(f"{name} = {value!r}: expected text without quotation marks, backslashes and line ends")


def _check(config: LaunchConfig, path: str) -> None:
    """Check what no single field shows, and every training configuration: an error now is cheaper than in the queue."""
    if not re.fullmatch(r"[^%\"\\\n]+", config.out):  # Slurm expands % in the names of logs
        raise FlexOlmoError(f"{path}: out = {config.out!r}: expected a path without %, quotation marks and backslashes")
    stages = [stage for stage in ("anchor", "experts", "merge") if getattr(config, stage) is not None]
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
        _check_training(config.anchor, [f"out={config.out}"], f"{path}: anchor")
    if config.experts:
        _check_experts(config.experts, config.out, path)
    if config.merge and not config.experts and not config.merge.packages:
        raise FlexOlmoError(f"{path}: merge.packages is empty and there is no section experts: nothing to merge")


def _check_experts(experts: ExpertsJob, out: str, path: str) -> None:
    if not experts.each:
        raise FlexOlmoError(f"{path}: experts.each is empty: expected at least one expert")
    for name, expert in experts.each.items():
        check_expert_name(name)
        if bool(expert.documents) == (expert.domain_vector is not None):
            raise FlexOlmoError(f"{path}: experts.each.{name}: expected either documents or domain_vector")
        _check_training(training_of(experts, expert), [f"out={out}"], f"{path}: experts.each.{name}")


def training_of(experts: ExpertsJob, expert: Expert) -> ExpertsJob:
    """The training options of one expert: those of all, then its own."""
    return replace(experts, config=[*experts.config, *expert.config], options=[*experts.options, *expert.options])


def _check_training(job: AnchorJob | ExpertsJob, added: list[str], where: str) -> None:
    try:
        training = load_config(TrainConfig, preset=job.preset, paths=job.config, overrides=[*job.options, *added])
    except FlexOlmoError as error:
        raise FlexOlmoError(f"{where}: {error}") from None
    if training.stop_after is not None:
        raise FlexOlmoError(f"{where}: stop_after = {training.stop_after}: a job ends by its time limit and goes on "
                            "after a requeue; leave stop_after out")
