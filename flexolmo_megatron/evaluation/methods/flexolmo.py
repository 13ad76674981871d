"""FlexOlmo itself, in every form: merged, router-tuned, with any number of active experts, without each owner, and
with owners who trained in another way (ablations)."""

from collections.abc import Mapping
from pathlib import Path

from flexolmo_megatron.config.card import PUBLIC, UNTUNED, ModelCard
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.rows import choose
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods.base import Method, Models, Settings, Variant, single

_PAPER = "arXiv 2507.07024"
ABLATIONS: Mapping[str, str] = {
    "no coordination": "experts are the FFNs of the owners' dense models, not trained beside the anchor",
    "no window": "each token is routed by its own logits alone, as in the paper",
    "trained rows": "router rows start at domain vectors and train, with a margin loss, instead of being discriminants",
    "no routing noise": "experts learn without noise on the routing",
    "drift penalty": "experts are kept from moving the mean hidden state of their documents",
    "no embedding init": "router rows start at random instead of at a domain vector",
    "no bias": "router rows start at domain vectors and train, without a bias",
    "no embedding init, no bias": "router rows start at random and have no bias",
    "embedder init": "router rows start at the means of another model's document embeddings",
    "centred rows": "router rows start at the difference of the domain vector from the anchor's row",
    "anchor KL": "owners' losses keep the pair near the anchor on public text, half of what they read",
    "calibrated temperature": "all router rows divided by a number that is chosen on public text",
    "no replay": "owners train on their own documents alone",
    "paper": "the paper's setting throughout",
}
"""What is different in each ablation that has a usual name (tables 1 and 3 of the paper)."""


def _card(path: Path, what: str) -> ModelCard:
    card = open_model(path).card
    if card.kind != "moe" or card.expert_names[0] != PUBLIC or card.model.num_experts < 2:
        raise FlexOlmoError(f"{path} is no {what} (kind {card.kind}, {card.model.num_experts} experts): expected one "
                            f"with the expert {PUBLIC!r} and at least one owner's")
    return card


def _active(name: str, path: Path, card: ModelCard, definition: str, runs: Mapping[str, int]) -> list[Method]:
    """The model with its own number of active experts, then with every number."""
    own = card.model.top_k
    methods = [single(name, "flexolmo", Variant(path, top_k=own), f"{definition}; {own} experts active",
                      f"{_PAPER}, section 3", runs)]
    return methods + [single(f"{name} top-{count}", "flexolmo", Variant(path, top_k=count),
                             f"{definition}; {count} experts active", f"{_PAPER}, section 5", runs)
                      for count in range(1, card.model.num_experts + 1)]


def flexolmo(models: Models, settings: Settings) -> list[Method]:
    """The merged and the router-tuned model; each with 1 to all experts active, and without each owner.

    Raises:
        FlexOlmoError: a model is not merged, see ``open_model``.
    """
    methods = []
    for name, path in (("FlexOlmo", models.merged), ("FlexOlmo tuned", models.tuned)):
        if path is None:
            continue
        card = _card(path, "merged model")
        owners = card.model.num_experts - 1
        runs = {"public": 1, "owner": owners}
        tuned = bool(card.row_sets)
        definition = "experts trained beside the frozen anchor, merged without joint training"
        if tuned:
            runs["router"] = 1
            definition = "the merged model, its router rows tuned on public data and all owners' proxies"
        methods += _active(name, path, card, definition, runs)
        for owner in card.expert_names[1:]:
            methods += _opt_outs(name, path, card, owner, runs)
    return methods


def _opt_outs(name: str, path: Path, card: ModelCard, owner: str, runs: Mapping[str, int]) -> list[Method]:
    top_k = card.model.top_k
    rows = choose(card.row_sets, [owner])
    without = f"{name} without {owner}"
    strict = Variant(path, (owner,), top_k)
    fewer = {**runs, "owner": runs["owner"] - 1}
    if rows is None:
        return [single(without, "flexolmo", strict, f"the merged model without the expert and router row of {owner}",
                       f"{_PAPER}, section 3", {kind: count for kind, count in fewer.items() if count})]
    if rows.name == UNTUNED:
        fewer.pop("router")
    return [
        single(f"{without} (strict)", "flexolmo", strict, f"without {owner}, with router rows that nothing of "
               f"{owner} has shaped: {rows.name}", "strict opt-out of this package",
               {kind: count for kind, count in fewer.items() if count}),
        single(f"{without} (expert-only)", "flexolmo", Variant(path, (owner,), top_k, "tuned"),
               f"without {owner}, whose data has helped to tune the other rows", f"{_PAPER}, section 3", runs),
    ]


def ablations(models: Models, settings: Settings) -> list[Method]:
    """Other merged models, each named after what is different about it.

    Raises:
        FlexOlmoError: a model is not merged, see ``open_model``.
    """
    methods = []
    for name, path in models.ablations.items():
        card = _card(path, f"merged model for the ablation {name!r}")
        runs = {"public": 1, "owner": card.model.num_experts - 1}
        runs |= {"router": 1} if any(rows.proxies for rows in card.row_sets) else {}
        methods.append(single(f"FlexOlmo, {name}", "ablations", Variant(path, top_k=card.model.top_k),
                              ABLATIONS.get(name, name), f"{_PAPER}, tables 1 and 3", runs))
    return methods
