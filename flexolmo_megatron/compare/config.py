"""The YAML file of ``flexolmo compare``, and the training configuration of each run that follows from it."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING, OmegaConf

from flexolmo_megatron.compare.settings import ABLATIONS, DECIDED, ROLE_DEFAULTS, SETTINGS, TRAINED_ROWS
from flexolmo_megatron.config.card import check_expert_name
from flexolmo_megatron.config.layout import data_parallel_size
from flexolmo_megatron.config.load import load_config, parse_override, read_yaml
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import ParallelConfig, RouterTrainConfig, TrainConfig
from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.launch.config import SlurmConfig
from flexolmo_megatron.launch.load import check_slurm, reject_unknown
from flexolmo_megatron.words import as_words, parse_words

ROLES = {"public": "anchor", "owner": "expert", "dense": "dense", "btx": "moe", "unrestricted": "moe",
         "router": "router"}
"""Sections of options, and the mode of `flexolmo train` that each is for."""
DEFAULT_TOP_K = 4
"""Active experts, where there are so many: quality has reached its plateau there (arXiv 2507.07024, section 5)."""


@dataclass
class Texts:
    """Documents of one domain."""

    train: list[str] = MISSING
    """Files, or patterns such as news/*.jsonl.gz (.jsonl, .jsonl.gz, .jsonl.zst, .parquet)."""
    valid: list[str] = MISSING
    """Held-out files: no document of them may be in train."""


@dataclass
class StepsConfig:
    """Optimizer steps of each kind of run."""

    public: int = 1200
    """Of the anchor."""
    owner: int = 600
    """Of each owner's run: beside the anchor, without coordination, and dense. The unrestricted mixtures get as many as
    have the FLOPs of all owners' runs, and twice that."""
    router: int = 200
    """Of router tuning; 0 for none."""
    btx: int | None = None
    """Of BTX's training on public data after its merge; by default router's, so that both have one budget."""


@dataclass
class EvaluationConfig:
    """What is measured."""

    max_bytes: int | None = None
    """UTF-8 bytes of each domain's held-out text, from its first document on; by default all."""
    mixed: bool = True
    """Also measure on texts of passages (200 to 400 bytes) of different domains."""
    batch_tokens: int = 8192
    """Tokens, with padding, that a model computes at a time."""
    btm_temperatures: list[float] = field(default_factory=lambda: [1.0])
    """tau of BTM's weights softmax(-NLL / tau), NLL being in nats over the text."""
    btm_top_k: list[int] = field(default_factory=lambda: [2])
    """Models that BTM mixes; a mixture of all of them comes on top."""
    soup_temperature: float = 0.1
    """The same for the weighted soup, whose NLL is per token."""
    prompt_bytes: int = 128
    """UTF-8 bytes from which a classifier picks a dense model."""
    classifier_documents: int = 2000
    """Training documents of each domain that this classifier learns from, at most."""


@dataclass
class CompareConfig:
    """`flexolmo compare CONFIG.yaml`."""

    out: str = MISSING
    """Folder of everything that is made. The same command goes on with what is there."""
    public: Texts = field(default_factory=Texts)
    """The public domain."""
    owners: dict[str, Texts] = MISSING
    """By name, each owner's documents, given like public."""
    text_key: str = "text"
    """Key of the JSON objects, or Parquet column, that holds a document."""
    tokenizer: str = "byte"
    """byte, or the name or folder of a Hugging Face tokenizer; model.vocab_size must hold it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture of the anchor, and so of all models."""
    seeds: list[int] = field(default_factory=lambda: [1, 2])
    """Everything is trained once for each: initial weights, order of samples."""
    steps: StepsConfig = field(default_factory=StepsConfig)
    """How long is trained."""
    top_k: int | None = None
    """Active experts of merged models and mixtures; by default 4, or all if there are fewer."""
    methods: list[str] = field(default_factory=list)
    """Families of methods: public, dense, soup, btm, prompt routing, btx, unrestricted, flexolmo, ablations; by default
    all. Only what they need is trained."""
    setting: str = "default"
    """How owners train: default, or paper for exactly the paper's way."""
    ablations: list[str] = field(default_factory=lambda: list(ABLATIONS))
    """Which of the usual ablations; each changes the setting in what its name says."""
    variants: dict[str, Any] = field(default_factory=dict)
    """Further ablations: a name, and the options of the owners' runs and of `embed` in which it differs from FlexOlmo,
    for example {half replay: {data.public_share: 0.5, embed.scale: 2}}; setting: paper replaces the setting, and
    calibrate: true chooses a temperature on public documents after the merge; embed.discriminant: true makes the rows
    of `flexolmo embed --public`."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of all runs, as for `flexolmo train`, for example {data: {seq_length: 256}, global_batch_size: 16}; the
    following are for single kinds of runs and win."""
    public_run: dict[str, Any] = field(default_factory=dict)
    """Of the anchor's run."""
    owner: dict[str, Any] = field(default_factory=dict)
    """Of owners' runs beside the anchor, in FlexOlmo and in all ablations but paper; after those of the setting."""
    dense: dict[str, Any] = field(default_factory=dict)
    """Of the owners' dense runs."""
    btx: dict[str, Any] = field(default_factory=dict)
    """Of BTX's training after its merge."""
    unrestricted: dict[str, Any] = field(default_factory=dict)
    """Of the mixtures that train on everything."""
    router: dict[str, Any] = field(default_factory=dict)
    """Of router tuning."""
    embed: dict[str, Any] = field(default_factory=dict)
    """Options of `flexolmo embed` for all domain vectors, for example {embedder: anchor, scale: 2, documents: 1000}."""
    proxy_public: list[str] = field(default_factory=list)
    """Public documents that owners' proxies are picked from, given like train; by default those of public.train. Tuning
    gains where some of them are like the owners' documents."""
    proxy_tokens: int | None = None
    """Budget of each owner's proxies, by default what router tuning reads of each; in any case at least that of twenty
    documents and at most a fifth of the public data."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """With --slurm: what each task of the arrays asks for."""

    @property
    def domains(self) -> dict[str, Texts]:
        """All domains, the public one first."""
        return {"public": self.public, **self.owners}

    @property
    def active(self) -> int:
        """Active experts of merged models and mixtures."""
        return self.top_k or min(DEFAULT_TOP_K, len(self.owners) + 1)

    @property
    def btx_steps(self) -> int:
        return self.steps.router if self.steps.btx is None else self.steps.btx


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options with dotted names: {a: {b: 1}} and {a.b: 1} are the same."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def owner_options(config: CompareConfig, variant: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the owners' runs, and those of `flexolmo embed`, of FlexOlmo or of an ablation.

    Args:
        config: all.
        variant: name of the ablation; None for FlexOlmo.

    Raises:
        FlexOlmoError: a penalty on drift is asked for, and nothing to measure it by.
    """
    changes = _asked(config, variant)
    setting = changes.pop("setting", None)
    changes.pop("calibrate", None)
    options = SETTINGS[setting or config.setting](config.steps.owner)
    if options.get("embed.discriminant") and not _can_discriminate(changes):
        options |= TRAINED_ROWS
    options |= (flatten(config.owner) if setting is None else {}) | changes
    has_discriminants = options.get("embed.discriminant") and not options.get("expert.random_row")
    if options.get("expert.drift_coeff") and not (has_discriminants and options.get("expert.coordination", True)):
        if "expert.drift_coeff" in flatten(config.owner if variant is None else config.variants.get(variant) or {}):
            raise FlexOlmoError(f"expert.drift_coeff = {options['expert.drift_coeff']}: expected 0 for experts without "
                                "discriminants, which it is measured by (`flexolmo embed --public`), or without "
                                "coordination")
        options["expert.drift_coeff"] = 0.0
    return {key: value for key, value in options.items() if not key.startswith("embed.")}, _of_embed(options)


def public_embed(config: CompareConfig, variant: str | None) -> dict[str, Any]:
    """Return the options of `flexolmo embed` for the anchor's own row: a setting's are about owners' rows alone, which
    are compared with the anchor's."""
    embed = _of_embed(_asked(config, variant))
    return {key: value for key, value in embed.items() if key not in ("centre", "discriminant")}


def _asked(config: CompareConfig, variant: str | None) -> dict[str, Any]:
    """What the sections embed and variants, or the ablation's name, ask for."""
    changes = flatten({} if variant is None else {**ABLATIONS, **config.variants}[variant] or {})
    return {f"embed.{key}": value for key, value in flatten(config.embed).items()} | changes


def _of_embed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("embed."): value for key, value in options.items()
            if key.startswith("embed.") and value is not None and value is not False}


def _can_discriminate(options: Mapping[str, Any]) -> bool:
    """Whether `flexolmo embed --public` goes with the other options, and was not declined."""
    usual = {"embedder": "anchor", "epsilon": None, "centre": False, "discriminant": True}
    return all(options.get(f"embed.{key}", value) == value for key, value in usual.items())


def ablation_folder(name: str) -> str:
    """Folder of an ablation or variant within a seed's."""
    return "ablations/" + re.sub(r"[^A-Za-z0-9._-]+", "_", name)


def is_calibrated(config: CompareConfig, variant: str) -> bool:
    """Whether an ablation's merged model gets a temperature that is chosen on public documents."""
    return bool(flatten({**ABLATIONS, **config.variants}[variant] or {}).get("calibrate"))


def training_config(config: CompareConfig, role: str, given: Mapping[str, Any],
                    options: Mapping[str, Any] | None = None) -> TrainConfig:
    """Return the configuration of one training run.

    Args:
        config: all.
        role: one of ``ROLES``.
        given: what the comparison itself decides: folders, data, steps, seed. Wins over everything. Folders and data
            may be missing where only numbers matter.
        options: instead of the section of the role.

    Raises:
        FlexOlmoError: an option that `flexolmo train` does not have (the nearest is offered), or an impossible value.
    """
    own = flatten(getattr(config, "public_run" if role == "public" else role)) if options is None else dict(options)
    steps = given.get("train_iters", 1)
    usual = ROLE_DEFAULTS[role](steps) if role in ROLE_DEFAULTS else {}
    merged = {"out": ".", "data.train": [], **flatten(config.train), **usual, **own, **given}
    if merged.get("data.public_share"):
        merged["data.public"] = merged.get("public_data", [])
    merged.pop("public_data", None)
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in merged.items()]
    try:
        return load_config(RouterTrainConfig if role == "router" else TrainConfig, overrides=overrides)
    except FlexOlmoError as error:
        raise FlexOlmoError(f"options of the {role} run: {str(error).removeprefix('the command line: ')}") from None


def load_compare(path: str, overrides: Sequence[str] = ()) -> CompareConfig:
    """Read and check a comparison's YAML file.

    Raises:
        FlexOlmoError: an unknown key (the nearest valid one is offered), a value of a wrong type, a missing or
            impossible one.
    """
    for values, where in ((read_yaml(path, "the YAML file of a comparison"), path),
                          *((parse_override(CompareConfig, override), "the command line") for override in overrides)):
        reject_unknown(CompareConfig, OmegaConf.to_container(values), where, "")
    config = load_config(CompareConfig, paths=[path], overrides=overrides)
    _check(config)
    return config


def _check(config: CompareConfig) -> None:
    from flexolmo_megatron.evaluation.methods import FAMILIES, Settings

    if not config.owners:
        raise FlexOlmoError("owners is empty: expected at least one owner with documents")
    for owner in config.owners:
        check_expert_name(owner)
        if "." in owner or owner in ("average", "mixed"):
            raise FlexOlmoError(f"owners.{owner}: expected a name without a dot, and other than average and mixed, "
                                "which are columns of the table")
    for domain, texts in config.domains.items():
        for name in ("train", "valid"):
            if not getattr(texts, name):
                where = domain if domain == "public" else f"owners.{domain}"
                raise FlexOlmoError(f"{where}.{name} = []: expected at least one file")
    for name, value, known in (*(("methods", value, list(FAMILIES)) for value in config.methods),
                               ("setting", config.setting, list(SETTINGS)),
                               *(("ablations", value, list(ABLATIONS)) for value in config.ablations)):
        if value not in known:
            raise FlexOlmoError(f"{name}: there is no {value!r}{nearest(value, known)}; expected some of "
                                f"{', '.join(map(repr, known))}")
    for folder, count in Counter(map(ablation_folder, (*config.ablations, *config.variants))).items():
        if count > 1:
            raise FlexOlmoError(f"ablations, variants: two of them would be in the folder {folder}: expected none "
                                "twice")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise FlexOlmoError(f"seeds = {config.seeds}: expected at least one, and none twice")
    for name, least in (("public", 1), ("owner", 1), ("router", 0), ("btx", 0)):
        value = getattr(config.steps, name)
        if value is not None and value < least:
            raise FlexOlmoError(f"steps.{name} = {value}: expected at least {least}")
    if not 1 <= config.active <= len(config.owners) + 1:
        raise FlexOlmoError(f"top_k = {config.top_k}: expected 1 to {len(config.owners) + 1}, all experts")
    for name, changes in config.variants.items():
        if name in ABLATIONS:
            raise FlexOlmoError(f"variants: {name!r} is the name of a usual ablation; choose another")
        if not isinstance(changes, Mapping):
            raise FlexOlmoError(f"variants.{name} = {changes!r}: expected options of owners' runs")
        setting = changes.get("setting", "default")
        if not isinstance(setting, str) or setting not in SETTINGS:
            raise FlexOlmoError(f"variants.{name}.setting = {setting!r}: expected one of {', '.join(SETTINGS)}")
        if not isinstance(calibrate := changes.get("calibrate", False), bool):
            raise FlexOlmoError(f"variants.{name}.calibrate = {calibrate!r}: expected true or false")
    _check_decided(config)
    _check_embed(public_embed(config, None), "embed")
    for name in (None, *config.ablations, *config.variants):
        _check_embed(owner_options(config, name)[1], f"variants.{name}" if name in config.variants else "embed")
    check_slurm(config.slurm, "compare")
    evaluation = config.evaluation
    Settings(evaluation.btm_temperatures, evaluation.btm_top_k, evaluation.soup_temperature, evaluation.prompt_bytes)
    for name, value in (("evaluation.max_bytes", evaluation.max_bytes), ("proxy_tokens", config.proxy_tokens),
                        ("evaluation.batch_tokens", evaluation.batch_tokens),
                        ("evaluation.classifier_documents", evaluation.classifier_documents)):
        if value is not None and value < 1:
            raise FlexOlmoError(f"{name} = {value}: expected at least 1")


def _check_decided(config: CompareConfig) -> None:
    """Refuse what would be ignored."""
    if config.model != config.model.dense():
        raise FlexOlmoError(f"model.num_experts = {config.model.num_experts}: expected none, the anchor is dense; "
                            "owners decide how many experts merged models have, top_k how many of them are active")
    sections = {name: getattr(config, name) for name in ("train", "public_run", *ROLES) if name != "public"}
    for section, options in (sections | {f"variants.{name}": value for name, value in config.variants.items()}).items():
        for key, value in flatten(options).items():
            for name, decider in DECIDED.items():
                if key == name or key.startswith(f"{name}."):
                    raise FlexOlmoError(f"{section}.{key} = {value}: expected no such option, it follows from "
                                        f"the comparison's {decider}")


def _check_embed(embed: Mapping[str, Any], where: str) -> None:
    """Check options of `flexolmo embed` as that command does."""
    from flexolmo_megatron.domain.embed import check_options
    from flexolmo_megatron.domain.privacy import chosen_mechanism

    options = {key: value for key, value in embed.items() if key != "discriminant"}
    given = parse_words(["embed", "docs", "--anchor", "anchor", "--out", "out", *as_words(options)], where)
    check_options(given.documents, given.seed, given.max_tokens, given.batch_size, given.scale)
    chosen_mechanism(given.epsilon, given.delta, given.clip)


def check_training(configs: Mapping[str, TrainConfig], processes: int) -> None:
    """Check the configurations of all runs, by their steps' names, before any of them starts.

    Raises:
        FlexOlmoError: what `flexolmo train` would refuse, or a layout other than data parallelism.
    """
    for name, config in configs.items():
        try:
            config.validate(data_parallel_size(config.parallel, processes))
        except FlexOlmoError as error:
            raise FlexOlmoError(f"{name}: {error}") from None
        if replace(config.parallel, moe_token_dispatcher_type="alltoall") != ParallelConfig():
            raise FlexOlmoError(f"{name}: parallel: expected no layout, a comparison's processes are data-parallel")
