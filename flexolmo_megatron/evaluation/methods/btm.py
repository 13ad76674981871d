"""Branch-Train-Merge: several dense models predict every token together.

Two ways to mix them. The mean of their probabilities (Li et al. 2022, arXiv 2208.03306) follows from the models'
log-probabilities of the text alone. The mean of their logits (arXiv 2507.07024, table 1) needs another pass of the
models; one model's logits are in memory at a time, beside their sum.

Two sources of the weights, see weights.py: the whole text, which no model that generates text could know, and at each
position the tokens before it.

Legend: n models, T tokens of a text, b sequences of a batch, s positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods.base import Method, Models, Settings, Variant
from flexolmo_megatron.evaluation.methods.store import Store
from flexolmo_megatron.evaluation.methods.weights import causal_weights, whole_text_weights
from flexolmo_megatron.evaluation.perplexity import LogProbs, batches
from flexolmo_megatron.evaluation.texts import TextSet
from flexolmo_megatron.inference.model import Model

Weigh = Callable[[np.ndarray], np.ndarray]
"""From the models' log-probabilities `[n, T]` of a text to their weights `[n, T]`."""


def per_text(store: Store, variants: Sequence[Variant], texts: TextSet) -> list[np.ndarray]:
    """Return the log-probabilities of several models `[n, T]` of each text.

    Raises:
        FlexOlmoError: the models cut the texts into different tokens.
    """
    values = [store.log_probs(variant, texts) for variant in variants]
    for variant, other in zip(variants, values, strict=True):
        if [len(part) for part in other] != [len(part) for part in values[0]]:
            raise FlexOlmoError(f"{variant.path} cuts {texts.name} into other tokens than {variants[0].path}: expected "
                                "models with one tokenizer")
    return [np.stack(parts) for parts in zip(*values, strict=True)]


def mix_probabilities(store: Store, texts: TextSet, variants: Sequence[Variant], weigh: Weigh) -> LogProbs:
    """Return log sum_i w_i p_i of every token."""
    mixed = []
    for log_probs_nT in per_text(store, variants, texts):
        with np.errstate(divide="ignore"):  # a weight of 0
            parts_nT = np.log(weigh(log_probs_nT)) + log_probs_nT
        mixed.append(np.logaddexp.reduce(parts_nT, axis=0).astype(np.float32))
    return mixed


def mix_logits(store: Store, texts: TextSet, variants: Sequence[Variant], weigh: Weigh) -> LogProbs:
    """Return the log-probability of every token under softmax(sum_i w_i z_i), z_i being the models' logits."""
    weights = [weigh(log_probs_nT).astype(np.float32) for log_probs_nT in per_text(store, variants, texts)]
    models = store.models([variant.path for variant in variants])
    documents = [models[0].tokenizer.encode(text) for text in texts.texts]
    mixed = [np.empty(len(tokens), np.float32) for tokens in documents]
    length = min(model.config.max_position_embeddings for model in models)
    bar = tqdm(desc=f"BTM on {texts.name}", total=sum(map(len, documents)), unit=" tokens", unit_scale=True,
               leave=False, disable=None)
    with bar:
        for batch in batches(documents, models[0].tokenizer.eod, length, store.batch_tokens):
            weights_nbs = torch.zeros(len(models), *batch.tokens_bs.shape)
            for row, window in enumerate(batch.windows):
                weights_nbs[:, row, window.counted] = torch.from_numpy(weights[window.document][:, window.places])
            logits_bsV = weighted_logits(models, batch.tokens_bs, weights_nbs)
            for window, log_probs in zip(batch.windows, batch.log_probs(logits_bsV), strict=True):
                mixed[window.document][window.places] = log_probs.cpu().numpy()
            bar.update(int(batch.counted_bs.sum()))
    return mixed


def weighted_logits(models: Sequence[Model], tokens_bs: torch.Tensor, weights_nbs: torch.Tensor) -> torch.Tensor:
    """Return sum_i w_i z_i `[b, s, V]`; a model is asked only about sequences where it has a weight somewhere."""
    total_bsV = None
    for model, weights_bs in zip(models, weights_nbs, strict=True):
        rows = weights_bs.any(dim=1).nonzero()[:, 0]
        if not len(rows):
            continue
        logits_bsV = model.logits(tokens_bs[rows], exact=False)
        logits_bsV *= weights_bs[rows, :, None].to(logits_bsV.device)
        if total_bsV is None:
            total_bsV = logits_bsV.new_zeros(*tokens_bs.shape, logits_bsV.shape[-1])
        total_bsV.index_add_(0, rows.to(logits_bsV.device), logits_bsV)
    return total_bsV


def btm(models: Models, settings: Settings) -> list[Method]:
    """Every combination of the temperatures, numbers of models, ways to mix and sources of the weights."""
    variants = (Variant(models.public), *(Variant(path) for path in models.dense.values()))
    count = len(variants)
    if count == 1:
        return []
    methods = []
    for temperature in settings.btm_temperatures:
        for top_k in dict.fromkeys(min(top_k, count) for top_k in (*settings.btm_top_k, count)):
            for sees, weights, of in (("oracle", whole_text_weights, "the whole text's likelihood"),
                                      ("causal", causal_weights, "the likelihood of the tokens before")):
                weigh = partial(weights, temperature=temperature, top_k=top_k)
                for mix, what in ((mix_logits, "logits"), (mix_probabilities, "probabilities")):
                    name = f"BTM top-{top_k} {sees}" + (" probabilities" if what == "probabilities" else "")
                    if len(settings.btm_temperatures) > 1:
                        name += f" tau={temperature:g}"
                    asked = f"{top_k} of {count}" if top_k < count else f"all {count}"
                    definition = (f"weighted mean of the {what} of {asked} dense models, the public one among them; "
                                  f"weights softmax(-NLL / {temperature:g}) from {of}")
                    methods.append(Method(name, "btm", definition, _SOURCES[what], sees, _inference(sees, top_k, count),
                                          {"public": 1, "owner": count - 1}, variants,
                                          partial(_log_probs, name, temperature, mix, variants, weigh)))
    return methods


_SOURCES = {"logits": "arXiv 2507.07024, table 1", "probabilities": "arXiv 2208.03306"}


def _inference(sees: str, top_k: int, count: int) -> str:
    if sees == "oracle" and top_k < count:
        return f"{count} forward passes for the weights, {top_k} of them again to predict"
    return f"{count} forward passes"


def _log_probs(name: str, temperature: float, mix: Callable[..., LogProbs], variants: Sequence[Variant], weigh: Weigh,
               store: Store, texts: TextSet) -> LogProbs:
    if mix is mix_probabilities:
        return mix(store, texts, variants, weigh)
    return store.remember(f"{name} {temperature}", variants, texts, lambda: mix(store, texts, variants, weigh))
