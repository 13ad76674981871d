"""Branch-Train-MiX: dense models become a mixture, which is then trained (Sukhbaatar et al. 2024, arXiv 2403.07816).

The experts are the FFNs of the public and of the owners' dense models, all other parameters are the models' mean, the
router is random. In the comparison the training that follows sees public data alone (arXiv 2507.07024, table 1):
owners' data is at hand to no coordinator. ``flexolmo train moe`` does it, from ``write_btx``'s checkpoint.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, ModelCard
from flexolmo_megatron.convert.initial import random_model
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.convert.names import expected_tensors
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.evaluation.methods.base import Method, Models, Settings, Variant, single
from flexolmo_megatron.evaluation.methods.soup import average, check_same_sizes


def merge_btx(public: LazyModel, dense: Mapping[str, LazyModel], top_k: int, seed: int) -> LazyModel:
    """Return the mixture before its training; a tensor is read when the result's is.

    Args:
        public: expert 0; dense or a published anchor.
        dense: by owner's name, the other experts.
        top_k: active experts.
        seed: of the router's weights.

    Raises:
        FlexOlmoError: the models have other sizes, or top_k is impossible.
    """
    models = [as_dense(model) for model in (public, *dense.values())]
    check_same_sizes(models)
    config = replace(models[0].card.model, num_experts=len(models), top_k=top_k)
    card = ModelCard("moe", config, [ExpertRecord(name) for name in (PUBLIC, *dense)],
                     tokenizer=models[0].card.tokenizer)
    tensors = average(models).tensors | random_model(replace(card, kind="router"), seed).tensors
    for number, model in enumerate(models):
        tensors |= {name.replace(".mlp.", f".mlp.experts.{number}."): tensor for name, tensor in model.tensors.items()
                    if ".mlp." in name}
    return LazyModel(card, {name: tensors[name] for name in expected_tensors(config, "moe")})


def write_btx(public: str | os.PathLike, dense: Mapping[str, Path], out: str | os.PathLike, *, top_k: int, seed: int,
              format: Literal["hf", "megatron"] = "megatron") -> None:
    """Write the mixture before its training to the new directory ``out``; see ``merge_btx``.

    Raises:
        FlexOlmoError: see ``open_model``, ``merge_btx`` and ``save_model``.
    """
    models = {owner: open_model(path) for owner, path in dense.items()}
    save_model(merge_btx(open_model(public), models, top_k, seed), out, format)


def btx(models: Models, settings: Settings) -> list[Method]:
    """The mixture after its training."""
    if not models.btx:
        return []
    definition = ("experts are the dense models' FFNs, other parameters their mean, the router is random; then all of "
                  "it is trained on public data")
    return [single("BTX", "btx", Variant(models.btx), definition, "arXiv 2403.07816 and 2507.07024, table 1",
                   {"public": 1, "owner": len(models.dense), "btx": 1})]
