"""Models that predict by themselves: the anchor, each owner's dense model, and mixtures trained on everything."""

from flexolmo_megatron.evaluation.methods.base import Method, Models, Settings, Variant, single

PAPER = "arXiv 2507.07024, table 1"


def public(models: Models, settings: Settings) -> list[Method]:
    """The model before any owner."""
    return [single("public", "public", Variant(models.public), "the anchor: trained on public data alone", PAPER,
                   {"public": 1})]


def dense(models: Models, settings: Settings) -> list[Method]:
    """One method per owner."""
    return [single(f"dense {owner}", "dense", Variant(path),
                   f"the anchor, all of it trained further on the data of {owner}", PAPER, {"public": 1, "owner": 1})
            for owner, path in models.dense.items()]


def unrestricted(models: Models, settings: Settings) -> list[Method]:
    """One method per amount of training; owners who share no data could not train such a mixture."""
    return [single(f"unrestricted MoE {scale}", "unrestricted", Variant(path), "a mixture of copies of the anchor, "
                   f"trained on all public and owners' data together, with {scale} the FLOPs of all owners' runs",
                   PAPER, {"public": 1, f"unrestricted-{scale}": 1})
            for scale, path in models.unrestricted.items()]
