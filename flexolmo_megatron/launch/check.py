"""What a launch needs and none of its jobs makes, looked for before anything waits in a queue."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flexolmo_megatron.config.card import check_published
from flexolmo_megatron.config.layout import ModelKind, check_layout, data_parallel_size
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import ExpertConfig, TrainConfig
from flexolmo_megatron.domain.privacy import chosen_mechanism
from flexolmo_megatron.domain.vector import load_vector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.launch.config import LaunchConfig, expert_names, published_anchor
from flexolmo_megatron.launch.load import job_slurm, training_config
from flexolmo_megatron.words import parse_words


def check_arguments(config: LaunchConfig, stages: dict[str, list[str]]) -> None:
    """Check the words that the YAML file adds to single commands as those commands will.

    Args:
        config: the launch.
        stages: as for ``check_layouts``.

    Raises:
        FlexOlmoError: a command has no such option, or a value is of another type; or a training run needs one that
            is missing.
    """
    embed = ["embed", "docs", "--anchor", "a", "--out", "o", *config.embed_arguments]
    if {"anchor", "experts"} & set(stages):
        words = parse_words(embed, "embed_arguments")
        chosen_mechanism(words.epsilon, words.delta, words.clip)
    if config.experts and "experts" in stages:
        words = parse_words([*embed, *config.experts.embed_arguments], "experts.embed_arguments")
        chosen_mechanism(words.epsilon, words.delta, words.clip)
        for name in stages["experts"]:
            _check_drift(training_config(config, "experts", name).expert, bool(words.public), f"experts.each.{name}")
    if config.merge and {"merge", "router"} & set(stages):
        parse_words(["merge", "p", "--anchor", "a", "--out", "o", *config.merge.merge_arguments],
                    "merge.merge_arguments")
        parse_words(["eval", "--model", "m=p", "--domain", "d=p", "--out", "o", *config.merge.eval_arguments],
                    "merge.eval_arguments")


def _check_drift(expert: ExpertConfig, compared: bool, where: str) -> None:
    """Check that a penalty on drift will have what it is measured by; ``compared`` is for vectors that are yet made."""
    if not expert.drift_coeff:
        return
    vector = Path(expert.domain_vector)
    if vector.is_file():
        compared = load_vector(vector).moments is not None
    if not compared:
        raise FlexOlmoError(f"{where}: expert.drift_coeff = {expert.drift_coeff} with {vector}: expected a file from "
                            "`flexolmo embed --public` (experts.embed_arguments), or 0")


def check_layouts(config: LaunchConfig, stages: dict[str, list[str]]) -> None:
    """Check that the models of the training runs can be divided as their options say.

    Args:
        config: the launch.
        stages: the jobs that are to run; of the job experts with the names of its experts.

    Raises:
        FlexOlmoError: one cannot, or the published anchor is none.
    """
    made = "anchor" in stages
    for word in {"--public", "--centre"} & set(config.embed_arguments if made else []):
        raise FlexOlmoError(f"embed_arguments: {word} compares with a published anchor, which is for experts alone: "
                            "expected it in experts.embed_arguments")
    if config.merge:
        _check_windows(config, stages.get("experts", ()))
    if made:
        training = training_config(config, "anchor")
        _check(config, "anchor", training, training.model.dense(), "dense", None, "anchor")
    if not (made or Path(published_anchor(config)).exists()):
        return
    anchor = training_config(config, "anchor").model if made else _published(config)
    for name in stages.get("experts", ()):
        training, where = training_config(config, "experts", name), f"experts.each.{name}"
        try:
            pair = anchor.pair(training.expert.ffn_hidden_size, training.expert.bias, training.expert.router_window)
        except FlexOlmoError as error:
            raise FlexOlmoError(f"{where}: {error}") from None
        if training.expert.coordination:
            _check(config, "experts", training, pair, "pair", anchor.ffn_hidden_size, where)
        else:
            _check(config, "experts", training, anchor.dense(), "dense", None, where)
    if config.merge and "router" in stages:
        experts = 1 + len(expert_names(config)) + len(config.merge.packages)
        merged = replace(anchor, num_experts=experts, top_k=1)
        _check(config, "router", training_config(config, "router"), merged, "moe", None, "router")


def _check_windows(config: LaunchConfig, names: Sequence[str]) -> None:
    """Check that experts can be merged as far as their routers go."""
    windows = [training_config(config, "experts", name).expert.router_window for name in names]
    for name, window in zip(names, windows, strict=True):
        if window != windows[0]:
            raise FlexOlmoError(f"experts.each.{name}: expert.router_window = {window}, and {windows[0]} for "
                                f"{names[0]}: expected the same for all experts of a model")


def _published(config: LaunchConfig) -> ModelConfig:
    from flexolmo_megatron.convert.model import open_model

    path = published_anchor(config)
    card = open_model(path).card
    check_published(card, str(path))
    return card.model


def _check(config: LaunchConfig, stage: str, training: TrainConfig, model: ModelConfig, kind: ModelKind,
           anchor_width: int | None, where: str) -> None:
    slurm = job_slurm(config, stage)
    world = slurm.nodes * slurm.processes_per_node
    data_parallel = data_parallel_size(training.parallel, world)
    length = training.data.seq_length
    try:
        if length > model.max_position_embeddings:
            raise FlexOlmoError(f"data.seq_length = {length}: expected at most the model's max_position_embeddings = "
                                f"{model.max_position_embeddings}")
        check_layout(model, kind, training.parallel, world_size=world, seq_length=length,
                     microbatches=training.global_batch_size // (training.micro_batch_size * data_parallel),
                     anchor_ffn_hidden_size=anchor_width)
    except FlexOlmoError as error:
        raise FlexOlmoError(f"{where}: {error}") from None


def missing_inputs(config: LaunchConfig, stages: dict[str, list[str]]) -> list[str]:
    """Return a sentence for everything that the jobs read, that none of them makes and that is not there.

    Args:
        config: the launch.
        stages: as for ``check_layouts``.
    """
    missing = []
    if "anchor" in stages:
        assert config.anchor is not None
        missing += _documents("anchor.documents", config.anchor.documents)
        missing += _data("anchor", training_config(config, "anchor"))
    elif stages and not Path(published_anchor(config)).is_dir():
        missing.append(f"the published anchor {published_anchor(config)} does not exist")
    for name in stages.get("experts", ()):
        assert config.experts is not None
        expert, where = config.experts.each[name], f"experts.each.{name}"
        missing += _documents(f"{where}.documents", expert.documents)
        if expert.domain_vector is not None and not Path(expert.domain_vector).is_file():
            missing.append(f"{where}.domain_vector = {expert.domain_vector} does not exist")
        missing += _data(where, training_config(config, "experts", name))
    if config.merge and "merge" in stages:
        missing += [f"merge.packages: {path} does not exist" for path in config.merge.packages
                    if not Path(path).exists()]
    if config.merge and {"merge", "router"} & set(stages):
        for domain, patterns in config.merge.domains.items():
            missing += _documents(f"merge.domains.{domain}", patterns)
    if "router" in stages:
        missing += _data("router", training_config(config, "router"))
    return missing


def _documents(where: str, patterns: list[str]) -> list[str]:
    from flexolmo_megatron.training.documents import find_files

    missing = []
    for pattern in patterns:
        try:
            find_files([pattern])
        except FlexOlmoError as error:
            missing.append(f"{where}: {error}")
    return missing


def _data(where: str, training: TrainConfig) -> list[str]:
    from flexolmo_megatron.training.datasets import parse_blend

    data = training.data
    blends = {"data.train": data.train, "data.valid": data.valid, "data.public": data.public,
              **{f"data.proxies.{name}": blend for name, blend in data.proxies.items()}}
    return [f"{where}: {key}: {prefix}{suffix} does not exist" for key, blend in blends.items() if blend
            for prefix in parse_blend(blend, key)[0] for suffix in (".bin", ".idx")
            if not Path(f"{prefix}{suffix}").is_file()]
