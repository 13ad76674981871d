"""The steps of a comparison: what is trained for each seed, from what, and where the models will be."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexolmo_megatron.compare import work
from flexolmo_megatron.compare.budget import run_flops, run_tokens, step_flops
from flexolmo_megatron.compare.check import check_held_out
from flexolmo_megatron.compare.config import (
    ROLES,
    CompareConfig,
    ablation_folder,
    flatten,
    is_calibrated,
    owner_options,
    public_embed,
    training_config,
)
from flexolmo_megatron.compare.report import write_report
from flexolmo_megatron.compare.scores import held_out, score
from flexolmo_megatron.compare.steps import Plan, Step
from flexolmo_megatron.config.card import PUBLIC
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import RouterTrainConfig, TrainConfig
from flexolmo_megatron.evaluation.methods import FAMILIES, Method, Models
from flexolmo_megatron.training.documents import check_apart, find_files

DENSE_FAMILIES = ("dense", "soup", "btm", "prompt routing", "btx")
"""Families of methods that are made of the owners' dense models."""
UNRESTRICTED = {"1x": 1, "2x": 2}
_NO_PART = re.compile(
    r"out|anchor|merged|data\.(train|valid|public|cache|proxies.*)|expert\.domain_vector|(log|eval|save)_interval|"
    r"eval_iters|keep|async_save|checkpoint_hash|distributed_timeout_minutes|stop_after|max_skipped_steps|"
    r"micro_batch_size|optimizer\.use_distributed_optimizer|model\..*")
"""Options of a training run that have no part in its result, or that its step's inputs stand for."""


@dataclass
class Comparison:
    """What there is to do, and what it is about."""

    config: CompareConfig
    plan: Plan
    models: dict[int, Models] = field(default_factory=dict)
    """By seed, where the models will be."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Of one training run of each kind (``evaluation.methods.RUNS``)."""
    flops: dict[str, int] = field(default_factory=dict)
    """The same; "dense" for an owner's dense run, and the method's name for an owner's run of an ablation."""
    runs: dict[str, TrainConfig] = field(default_factory=dict)
    """By step, the configuration of its training run."""
    scores: dict[int, str] = field(default_factory=dict)
    """By seed, the step that evaluates."""
    skipped: list[str] = field(default_factory=list)
    """Lines on the domains of which held-out documents are skipped."""

    @property
    def families(self) -> list[str]:
        """Families of methods that are wanted."""
        return [family for family in FAMILIES if not self.config.methods or family in self.config.methods]

    @property
    def same(self) -> list[str]:
        """Ablations and variants that change nothing of FlexOlmo in this setting: nothing is trained for them."""
        config, usual = self.config, owner_options(self.config, None)
        return [name for name in (*config.ablations, *config.variants) if "ablations" in self.families
                and owner_options(config, name) == usual and not is_calibrated(config, name)]

    def budget_of(self, method: Method) -> tuple[int, int]:
        """Return the training tokens and FLOPs behind a method."""
        owners = "owner"
        if method.family in DENSE_FAMILIES:
            owners = "dense"
        elif method.family == "ablations":
            owners = method.name if method.name in self.flops else "owner"
        flops = sum(count * self.flops[owners if kind == "owner" else kind] for kind, count in method.runs.items())
        return method.training_tokens({**self.tokens, "owner": self.tokens.get(owners, 0)}), flops


def build_comparison(config: CompareConfig) -> Comparison:
    """Return all steps of a comparison.

    Raises:
        FlexOlmoError: a file of documents that does not exist, or options that `flexolmo train` does not have.
    """
    comparison = Comparison(config, Plan(Path(config.out)))
    held_out(config, comparison.skipped.append)  # texts that cannot be scored are refused before anything is trained
    for domain, texts in config.domains.items():
        check_held_out(domain, texts, config.proxy_public)
        files = find_files(texts.train)
        comparison.plan.add(Step(f"data/{domain}", f"tokenize the documents of {domain}",
                                 work.tokenize(texts.train, config.tokenizer, config.text_key),
                                 {"files": _sizes(files), "tokenizer": config.tokenizer,
                                  "text_key": config.text_key}, files=tuple(files)))
    chosen = comparison.families
    tunes = "flexolmo" in chosen and config.steps.router > 0
    if tunes:
        _add_proxies(comparison)
    for seed in config.seeds:
        _Seed(comparison, seed, chosen, tunes).add()
    comparison.plan.add(Step("report", "write the tables and pictures",
                             lambda folder: write_report(comparison, folder),
                             {"same": comparison.same} if comparison.same else {}, tuple(comparison.scores.values()),
                             renewed=True))
    return comparison


def _sizes(files: Sequence[Path]) -> list[list[Any]]:
    return [[str(path), path.stat().st_size] for path in files]


def _add_proxies(comparison: Comparison) -> None:
    config, plan = comparison.config, comparison.plan
    router = training_config(config, "router", {"train_iters": config.steps.router})
    tokens = config.proxy_tokens or run_tokens(router) // (len(config.owners) + 1)
    public, pool = plan.out / "data" / PUBLIC / "tokens", find_files(config.proxy_public)
    for owner, texts in config.owners.items():
        name = f"proxies/{owner}"
        asked = plan.recorded(name).get("options", {}).get("tokens", tokens)
        if not public.with_suffix(".json").exists() or (
                work.proxy_budget(asked, public) != work.proxy_budget(tokens, public)):
            asked = tokens  # otherwise the same proxies, whatever was asked for
        check_apart(find_files(texts.train), pool)
        do = work.proxies(texts.train, config.proxy_public or config.public.train, public, asked, config.tokenizer,
                          config.text_key)
        options = {"tokens": asked} | ({"files": _sizes(pool)} if pool else {})
        plan.add(Step(name, f"public documents that look like those of {owner}", do, options,
                      (f"data/{PUBLIC}", f"data/{owner}"), files=tuple(pool)))


class _Seed:
    """Adds the steps of one seed."""

    def __init__(self, comparison: Comparison, seed: int, chosen: Sequence[str], tunes: bool) -> None:
        self.comparison, self.config, self.plan = comparison, comparison.config, comparison.plan
        self.seed, self.chosen, self.tunes = seed, chosen, tunes
        self.prefix = f"seed_{seed}"
        self.owners = list(self.config.owners)

    def path(self, *parts: str) -> Path:
        return self.plan.out.joinpath(*parts)

    def data(self, *domains: str) -> list[str]:
        return [str(self.path("data", domain, "tokens")) for domain in domains]

    def add(self) -> None:
        config, models = self.config, {}
        run = self.train("public", "public", "train the public anchor", self.config.model, config.steps.public,
                         self.data(PUBLIC), (f"data/{PUBLIC}",), kind="public",
                         given=flatten({"model": asdict(config.model)}))
        self.anchor_run = self.path(run, "run")
        anchor = self.publish("anchor", public_embed(config, None))
        models["public"] = self.path(anchor, "model")
        inputs = [anchor]
        if any(family in DENSE_FAMILIES for family in self.chosen):
            inputs += self.add_dense(anchor, models)
        if "unrestricted" in self.chosen:
            inputs += self.add_unrestricted(anchor, models)
        if "flexolmo" in self.chosen or "ablations" in self.chosen:
            inputs += self.add_flexolmo(anchor, models)
        self.comparison.models[self.seed] = Models(**models)
        self.add_scores(inputs)

    def train(self, name: str, role: str, what: str, model: ModelConfig, steps: int, data: list[Any],
              inputs: Sequence[str], *, kind: str, given: Mapping[str, Any] | None = None,
              options: Mapping[str, Any] | None = None) -> str:
        """Add a training run; ``kind`` is what its budget is counted as."""
        name = f"{self.prefix}/{name}"
        config = training_config(self.config, role, {
            "out": str(self.path(name, "run")), "data.train": data, "train_iters": steps, "seed": self.seed,
            "public_data": self.data(PUBLIC), **(given or {})}, options)
        mode = ROLES[role]
        tokens = run_tokens(config)
        flops = run_flops(mode, model, config)
        if role == "router" and config.leave_one_out:  # a set of rows for all, and one without each owner
            tokens, flops = tokens * (len(self.owners) + 1), flops * (len(self.owners) + 1)
        self.comparison.runs[name] = config
        self.comparison.tokens.setdefault(kind, run_tokens(config))
        self.comparison.flops.setdefault(kind, run_flops(mode, model, config))
        recorded = {"mode": mode, "model": asdict(model), **_chosen(config)}
        return self.plan.add(Step(name, f"{what}, {steps:,} steps", work.training(mode, config), recorded,
                                  tuple(inputs), tokens, flops, parallel=True))

    def publish(self, name: str, embed: Mapping[str, Any]) -> str:
        """The anchor with its router row."""
        config = self.config
        return self.plan.add(Step(
            f"{self.prefix}/{name}", "the published anchor",
            work.publish(self.anchor_run, config.public.train, config.text_key, embed), {"embed": embed},
            (f"{self.prefix}/public", f"data/{PUBLIC}")))

    def add_dense(self, anchor: str, models: dict[str, Any]) -> list[str]:
        """Dense models of all owners, and what is made of them."""
        config, public = self.config, self.path(anchor, "model")
        steps = [self.train(f"dense/{owner}", "dense", f"train all of the anchor on {owner}", config.model,
                            config.steps.owner, self.data(owner), (anchor, f"data/{owner}"), kind="dense",
                            given={"anchor": str(public)}) for owner in self.owners]
        models["dense"] = {owner: self.path(step, "run") for owner, step in zip(self.owners, steps, strict=True)}
        made = list(steps)
        if "soup" in self.chosen:
            paths = [public, *models["dense"].values()]
            made.append(self.plan.add(Step(f"{self.prefix}/soup", "average the dense models", work.soup(paths), {},
                                           (anchor, *steps))))
            models["soup"] = self.path(made[-1], "model")
        if "btx" in self.chosen and config.btx_steps:
            start = self.plan.add(Step(f"{self.prefix}/btx_start", "put the dense models' FFNs side by side",
                                       work.btx(public, models["dense"], config.active, self.seed),
                                       {"top_k": config.active, "seed": self.seed}, (anchor, *steps)))
            made.append(self.train("btx", "btx", "train the mixture of dense models on public data", self.mixture,
                                   config.btx_steps, self.data(PUBLIC), (start, f"data/{PUBLIC}"), kind="btx",
                                   given={"anchor": str(self.path(start, "model"))}))
            models["btx"] = self.path(made[-1], "run")
        return made

    @property
    def mixture(self) -> ModelConfig:
        """Architecture of a mixture of as many experts as a merged model has."""
        sizes = {**asdict(self.config.model), "num_experts": len(self.owners) + 1, "top_k": self.config.active}
        return ModelConfig(**sizes)

    def add_unrestricted(self, anchor: str, models: dict[str, Any]) -> list[str]:
        """Mixtures that train on everything, with the FLOPs of the owners' runs together, and twice that."""
        config = self.config
        given = {"anchor": str(self.path(anchor, "model")), "model.num_experts": self.mixture.num_experts,
                 "model.top_k": self.mixture.top_k}
        domains = [PUBLIC, *self.owners]
        data = [word for prefix in self.data(*domains) for word in (1 / len(domains), prefix)]
        owner = self.owner_run("experts", self.owners[0], None, anchor)
        budget = len(self.owners) * run_flops("expert", config.model, owner)
        step = step_flops("moe", self.mixture, training_config(config, "unrestricted", {}))
        steps = [self.train(f"unrestricted_{scale}", "unrestricted", f"train a mixture on everything, {scale} FLOPs",
                            self.mixture, max(1, round(factor * budget / step)), data,
                            (anchor, *(f"data/{domain}" for domain in domains)), kind=f"unrestricted-{scale}",
                            given=given) for scale, factor in UNRESTRICTED.items()]
        models["unrestricted"] = {scale: self.path(name, "run")
                                  for scale, name in zip(UNRESTRICTED, steps, strict=True)}
        return steps

    def owner_given(self, owner: str, anchor: str, vectors: str) -> dict[str, Any]:
        return {"anchor": str(self.path(anchor, "model")), "expert.name": owner,
                "expert.domain_vector": str(self.path(self.prefix, vectors, owner, "domain.npz"))}

    def owner_run(self, folder: str, owner: str, variant: str | None, anchor: str) -> TrainConfig:
        """The configuration of an owner's run, for its budget alone."""
        return training_config(self.config, "owner", {
            "public_data": self.data(PUBLIC), "train_iters": self.config.steps.owner,
            **self.owner_given(owner, anchor, folder)}, owner_options(self.config, variant)[0])

    def add_flexolmo(self, anchor: str, models: dict[str, Any]) -> list[str]:
        """The owners' runs, merged and tuned; and the same for each ablation."""
        config, usual = self.config, owner_options(self.config, None)
        self.add_vectors("vectors", anchor, usual[1])
        made, usual_merged = [], None
        if "flexolmo" in self.chosen:
            usual_merged = self.add_merged("", None, anchor, "vectors")
            models["merged"] = self.path(usual_merged, "model")
            made.append(usual_merged)
            if self.tunes:
                made.append(self.add_router(usual_merged))
                models["tuned"] = self.path(made[-1], "run")
        models["ablations"] = {}
        names = [*config.ablations, *config.variants] if "ablations" in self.chosen else []
        same = self.comparison.same
        for name in (name for name in names if name not in same):
            options, calibrated = owner_options(config, name), is_calibrated(config, name)
            folder = ablation_folder(name)
            its_anchor, vectors = anchor, "vectors"
            if options[1] != usual[1]:
                vectors = f"{folder}/vectors"
                if public_embed(config, name) != public_embed(config, None):
                    # Rows of other embedders have nothing to do with each other.
                    its_anchor = self.publish(f"{folder}/anchor", public_embed(config, name))
                self.add_vectors(vectors, its_anchor, options[1])
            step = usual_merged if options == usual else None  # only what comes after the merge differs
            step = step or self.add_merged(f"{folder}/", name, its_anchor, vectors)
            if calibrated:
                step = self.plan.add(Step(
                    f"{self.prefix}/{folder}/calibrated", "choose a temperature on public documents",
                    work.calibrate(self.path(step, "model"), config.public.train, config.text_key), {},
                    (step, f"data/{PUBLIC}")))
            made.append(step)
            models["ablations"][name] = self.path(step, "model")
        return made

    def add_vectors(self, folder: str, anchor: str, embed: Mapping[str, Any]) -> None:
        for owner, texts in self.config.owners.items():
            do = work.vector(self.path(anchor, "model"), texts.train, self.config.public.train, self.config.text_key,
                             embed)
            self.plan.add(Step(f"{self.prefix}/{folder}/{owner}", f"the domain vector of {owner}", do, {"embed": embed},
                               (anchor, f"data/{owner}", f"data/{PUBLIC}")))

    def add_merged(self, folder: str, variant: str | None, anchor: str, vectors: str) -> str:
        """Runs of all owners, and the model that is merged from them."""
        config, (options, _) = self.config, owner_options(self.config, variant)
        of = f" ({variant})" if variant else ""
        steps = []
        for owner in self.owners:
            steps.append(self.train(
                f"{folder}experts/{owner}", "owner", f"train the expert {owner}{of}", config.model, config.steps.owner,
                self.data(owner), (anchor, f"{self.prefix}/{vectors}/{owner}", f"data/{owner}", f"data/{PUBLIC}"),
                kind=f"FlexOlmo, {variant}" if variant else "owner", given=self.owner_given(owner, anchor, vectors),
                options=options))
        window = None  # pairs say themselves what theirs is; dense copies get that of FlexOlmo's pairs
        if not self.comparison.runs[steps[0]].expert.coordination:
            window = owner_options(config, None)[0].get("expert.router_window", 1)
        do = work.merge(
            self.path(anchor, "model"), {owner: self.path(step, "run") for owner, step in
                                         zip(self.owners, steps, strict=True)},
            {owner: self.path(self.prefix, vectors, owner, "domain.npz") for owner in self.owners},
            window, config.active)
        options = {"top_k": config.active} | ({} if window is None else {"router_window": window})
        return self.plan.add(Step(f"{self.prefix}/{folder}merged", f"pack and merge the experts{of}", do, options,
                                  (anchor, *steps)))

    def add_router(self, merged: str) -> str:
        given = {"merged": str(self.path(merged, "model")),
                 **{f"data.proxies.{owner}": [str(self.path("proxies", owner, "tokens"))] for owner in self.owners}}
        return self.train("router", "router", "tune the router on proxies", self.mixture, self.config.steps.router,
                          self.data(PUBLIC), (merged, f"data/{PUBLIC}", *(f"proxies/{owner}" for owner in self.owners)),
                          kind="router", given=given)

    def add_scores(self, inputs: Sequence[str]) -> None:
        config, comparison, seed = self.config, self.comparison, self.seed
        files = {domain: find_files(texts.valid) for domain, texts in config.domains.items()}
        options = {"families": list(self.chosen), "evaluation": asdict(config.evaluation),
                   "ablations": list(comparison.models[seed].ablations),
                   "files": {domain: _sizes(paths) for domain, paths in files.items()},
                   "text_key": config.text_key}
        comparison.scores[seed] = self.plan.add(Step(
            f"{self.prefix}/scores", "evaluate all methods", lambda folder: score(comparison, seed, folder), options,
            tuple(inputs), renewed=True, files=tuple(path for paths in files.values() for path in paths)))


def _chosen(config: TrainConfig) -> dict[str, Any]:
    """The options of a run that decide its result and are not the defaults."""
    usual = flatten(asdict(RouterTrainConfig() if isinstance(config, RouterTrainConfig) else TrainConfig()))
    return {key: value for key, value in flatten(asdict(config)).items()
            if value != usual.get(key) and not _NO_PART.fullmatch(key)}
