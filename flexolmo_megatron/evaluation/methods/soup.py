"""Model soups: one dense model whose parameters are a weighted mean of several models' (Wortsman et al. 2022,
arXiv 2203.05482; weighted: arXiv 2507.07024, table 1).

The plain soup is a checkpoint of its own. The weighted one has other weights for each text, so each text has a model
of its own, which is made in memory.

Legend: n models, T tokens of a text, P parameters.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods.base import Method, Models, Settings, Variant, single
from flexolmo_megatron.evaluation.methods.btm import per_text
from flexolmo_megatron.evaluation.methods.store import Store
from flexolmo_megatron.evaluation.methods.weights import likelihood_weights
from flexolmo_megatron.evaluation.perplexity import LogProbs, document_log_probs
from flexolmo_megatron.evaluation.texts import TextSet

_PAPER = "arXiv 2507.07024, table 1"


def mean_tensor(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Return the mean of tensors of one shape, summed in float64 one after the other, in the first one's dtype."""
    def read() -> torch.Tensor:
        total = tensors[0].read().double()
        for tensor in tensors[1:]:
            total += tensor.read()
        return (total / len(tensors)).to(tensors[0].dtype)

    return LazyTensor(tensors[0].dtype, tensors[0].shape, read)


def check_same_sizes(models: Sequence[LazyModel]) -> None:
    """Check that dense models can be averaged.

    Raises:
        FlexOlmoError: none is given, or two have other sizes or tokenizers.
    """
    if not models:
        raise FlexOlmoError("no model to average: expected at least one")
    for number, model in enumerate(models[1:], 2):
        for what, value, first in (("sizes", model.card.model, models[0].card.model),
                                   ("tokenizer", model.card.tokenizer, models[0].card.tokenizer)):
            if value != first:
                raise FlexOlmoError(f"model {number} and the first one differ in their {what} ({value} and {first}): "
                                    "expected copies of one anchor")


def average(models: Sequence[LazyModel]) -> LazyModel:
    """Return the mean of models that are dense or published anchors; a tensor is read when the result's is.

    Raises:
        FlexOlmoError: see ``check_same_sizes``.
    """
    models = [as_dense(model) for model in models]
    check_same_sizes(models)
    return LazyModel(models[0].card, {name: mean_tensor([model.tensors[name] for model in models])
                                      for name in models[0].tensors})


def write_soup(paths: Sequence[str | os.PathLike], out: str | os.PathLike,
               format: Literal["hf", "megatron"] = "megatron") -> None:
    """Write the average of models to the new directory ``out``: the public one and all owners' dense ones.

    Raises:
        FlexOlmoError: see ``open_model``, ``average`` and ``save_model``.
    """
    save_model(average([open_model(path) for path in paths]), out, format)


def text_weights(log_probs_nT: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(-NLL / temperature) `[n]`, NLL being the mean over the tokens of a text."""
    nll_n1 = -log_probs_nT.mean(axis=1, keepdims=True, dtype=np.float64)
    return likelihood_weights(nll_n1, temperature, len(nll_n1))[:, 0]


def _weighted(paths: Sequence[Path], temperature: float, store: Store, texts: TextSet) -> LogProbs:
    from flexolmo_megatron.model.weights import load_weights  # imports Megatron

    weights = [text_weights(log_probs_nT, temperature)
               for log_probs_nT in per_text(store, [Variant(path) for path in paths], texts)]
    soup = store.load_alone(paths[-1])  # a dense one: the public model may be a published anchor
    parameters = list(soup.module.parameters())
    models_nP = []
    for path in paths:
        load_weights(soup.module, as_dense(open_model(path)))
        models_nP.append(parameters_to_vector(parameters))
    mixed = []
    pairs = zip(texts.texts, weights, strict=True)
    for text, weights_n in tqdm(pairs, f"soups for {texts.name}", len(weights), leave=False, disable=None):
        soup_P = torch.zeros_like(models_nP[0], dtype=torch.float32)
        for weight, model_P in zip(weights_n.tolist(), models_nP, strict=True):
            soup_P.add_(model_P, alpha=weight)
        vector_to_parameters(soup_P.to(store.dtype), parameters)
        mixed += document_log_probs(soup, [text], batch_tokens=store.batch_tokens)
    return mixed


def soup(models: Models, settings: Settings) -> list[Method]:
    """The plain soup and the weighted one."""
    paths = (models.public, *models.dense.values())
    count = len(paths)
    runs = {"public": 1, "owner": count - 1}
    methods = []
    if models.soup:
        methods.append(single("soup", "soup", Variant(models.soup), f"mean of the parameters of all {count} dense "
                              "models, the public one among them", _PAPER, runs))
    if models.dense:
        temperature, variants = settings.soup_temperature, tuple(Variant(path) for path in paths)
        name = f"soup weighted {temperature}"
        methods.append(Method(
            "soup weighted oracle", "soup", "as soup, with weights for each text: softmax(-NLL / "
            f"{temperature:g}), NLL being the mean over the whole text's tokens, in nats", _PAPER, "oracle",
            f"{count + 1} forward passes, and {count} models' parameters read for each text", runs, variants,
            lambda store, texts: store.remember(name, variants, texts,
                                                partial(_weighted, paths, temperature, store, texts))))
    return methods
