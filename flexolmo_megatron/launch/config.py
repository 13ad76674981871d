"""The YAML file of `flexolmo launch`: which jobs there are, and what each asks of Slurm; ``load.py`` reads it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING


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
    """Seconds before the time limit at which training is told to save and to stop. A checkpoint must take less. At most
    half of the time limit."""
    requeues: int = 50
    """How often a job may put itself back into the queue; preemptions do not count."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before anything else, for example module load, source .venv/bin/activate, export NCCL_…."""
    python: str = "python"
    """Command that starts Python; with a container for example apptainer exec --nv image.sif python."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch, for example {mem: 0, exclusive: true, constraint: a100}."""
    srun_options: dict[str, Any] = field(default_factory=dict)
    """Options of every srun, for example {container-image: image.sqsh, container-mounts: '/project:/project',
    container-workdir: /project}, the folder in which the launch is given. The shell does not expand them."""

    @property
    def processes_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass
class AnchorJob:
    """Trains the public anchor and publishes it."""

    documents: list[str] = MISSING
    """Public documents whose mean embedding is the public router row: files, or patterns such as public/*.jsonl."""
    preset: str | None = None
    """Named sizes and settings, as for `flexolmo train --preset`."""
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
    """Named sizes and settings, as for `flexolmo train --preset`."""
    config: list[str] = field(default_factory=list)
    """YAML files for `flexolmo train --config`, for all experts."""
    options: list[str] = field(default_factory=list)
    """KEY=VALUE options for `flexolmo train`, for all experts."""
    embed_arguments: list[str] = field(default_factory=list)
    """Further words for the experts' `flexolmo embed`, for example [--public, 'news/*.jsonl']."""
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
class RouterJob:
    """Tunes the merged model's router, and evaluates the result on the domains of `merge`."""

    preset: str | None = None
    """Named sizes and settings, as for `flexolmo train --preset`."""
    config: list[str] = field(default_factory=list)
    """YAML files for `flexolmo train --config`."""
    options: list[str] = field(default_factory=list)
    """KEY=VALUE options for `flexolmo train router`, after the files; at least data.train and data.proxies."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """What this job asks for otherwise than the section slurm."""


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
    """Further words for every `flexolmo embed`, the anchor's too, for example [--embedder, NAME]."""
    anchor: AnchorJob | None = None
    """Section of the job that trains and publishes the anchor; none to start from `published`."""
    experts: ExpertsJob | None = None
    """Section of the array job that trains the experts."""
    merge: MergeJob | None = None
    """Section of the job that merges and evaluates."""
    router: RouterJob | None = None
    """Section of the job that tunes the merged model's router, after the job `merge`."""


def training_of(experts: ExpertsJob, expert: Expert) -> ExpertsJob:
    """The training options of one expert: those of all, then its own."""
    return replace(experts, config=[*experts.config, *expert.config], options=[*experts.options, *expert.options])


def expert_names(config: LaunchConfig) -> list[str]:
    """The experts that the launch trains; none without a section experts."""
    return list(config.experts.each) if config.experts else []


def published_anchor(config: LaunchConfig) -> str:
    """Where the experts' anchor is, or will be."""
    return config.published or str(Path(config.out, "anchor"))


def given_options(config: LaunchConfig, stage: str, expert: str = "") -> dict[str, str]:
    """The options that a script adds to those of its training run; the templates have them as shell variables."""
    if stage == "anchor":
        return {"out": f"{config.out}/anchor_run"}
    if stage == "router":
        return {"out": f"{config.out}/router", "merged": f"{config.out}/merged"}
    assert config.experts is not None
    folder = f"{config.out}/experts/{expert}"
    vector = config.experts.each[expert].domain_vector or f"{folder}/domain.npz"
    return {"out": f"{folder}/run", "anchor": published_anchor(config), "expert.name": expert,
            "expert.domain_vector": vector}
