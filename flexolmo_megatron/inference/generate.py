"""Text from a model: greedy or sampled, batched, with a key/value cache and attribution.

Prompts of unequal length are padded on the left. Padding is hidden from attention, and RoPE only knows distances, so a
prompt's continuation does not depend on what it is batched with, up to rounding.

Legend: b sequences, s positions of the padded prompts, t positions so far, V vocabulary, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.inference.access import Experts, allowed_experts, named, only_allowed, using_rows
from flexolmo_megatron.inference.attribution import RoutingWeights

if TYPE_CHECKING:
    from flexolmo_megatron.inference.model import Model


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    """Tokens per prompt, at most."""
    temperature: float = 0.0
    """0: the most probable token. Above: sample from the logits divided by it."""
    top_k: int = 0
    """Sample among so many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the most probable tokens that together reach this probability."""
    seed: int = 0
    """Of the random numbers."""

    def __post_init__(self) -> None:
        for name, numbers in (("max_new_tokens", int), ("temperature", int | float), ("top_k", int),
                              ("top_p", int | float), ("seed", int)):
            value = getattr(self, name)
            if not isinstance(value, numbers) or isinstance(value, bool):
                raise FlexOlmoError(f"{name} = {value!r}: expected a {'whole ' * (numbers is int)}number")
        if self.max_new_tokens < 1:
            raise FlexOlmoError(f"max_new_tokens = {self.max_new_tokens}: expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise FlexOlmoError(f"temperature = {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise FlexOlmoError(f"top_k = {self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise FlexOlmoError(f"top_p = {self.top_p}: expected a probability above 0, at most 1")
        if self.seed < 0:
            raise FlexOlmoError(f"seed = {self.seed}: expected 0 or more")


@dataclass
class Generation:
    """The continuation of one prompt."""

    prompt: str
    text: str = ""
    """The continuation alone."""
    tokens: list[int] = field(default_factory=list)
    """Its ids, without the end-of-document token."""
    finish: Literal["eod", "length"] = "length"
    """Whether the model ended the document, or max_new_tokens were reached."""
    routing_share: dict[str, float] = field(default_factory=dict)
    """Expert name -> its share of the routing weight, the mean over layers and generated tokens (the end-of-document
    token counts); sums to one. Empty for a dense model."""
    rows: str = ""
    """Of a model with a tuned router: the rows that were used, and the guarantee where experts were left out; see
    ``Model.rows_used``."""


def filter_logits(logits_bV: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits divided by the temperature (above 0), -inf for tokens that top-k and then top-p leave out."""
    logits_bV = logits_bV / sampling.temperature
    if 0 < sampling.top_k < logits_bV.shape[-1]:
        smallest_b1 = logits_bV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_bV = logits_bV.masked_fill(logits_bV < smallest_b1, float("-inf"))
    if sampling.top_p < 1:
        probs_bV, order_bV = logits_bV.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token stays if those before it do not yet reach top_p; the first one always does.
        late_bV = probs_bV.cumsum(dim=-1) - probs_bV >= sampling.top_p
        late_bV[:, 0] = False
        logits_bV = logits_bV.masked_fill(torch.zeros_like(late_bV).scatter(1, order_bV, late_bV), float("-inf"))
    return logits_bV


def _choose(logits_bV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    if sampling.temperature == 0:
        return logits_bV.argmax(dim=-1).tolist()
    probs_bV = filter_logits(logits_bV, sampling).softmax(dim=-1)
    return [int(torch.multinomial(probs_V, 1, generator=generator))
            for probs_V, generator in zip(probs_bV, generators, strict=True)]


def _hidden(starts_b: Tensor, first: int, end: int) -> Tensor | None:
    """Attention mask of the queries ``first`` to ``end`` for prompts that start at ``starts_b``.

    Returns:
        Boolean `[b, 1, end - first, end]`, True where a query must not look; None for plain causal attention.
    """
    if not starts_b.any():
        return None
    queries = torch.arange(first, end, device=starts_b.device)[:, None]
    keys = torch.arange(end, device=starts_b.device)
    padding = keys < starts_b[:, None, None, None]
    # A padding position sees itself: without any key its softmax would be NaN.
    return ((keys > queries) | padding) & (keys != queries)


def _steps(model: "Model", prompts: Sequence[list[int]], max_new_tokens: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Run the prompts, then one token after the other.

    Yields:
        fp32 logits `[b, V]` for the next token of each sequence, and a list to be filled with the chosen ids.
    """
    from megatron.core.inference.contexts import StaticInferenceContext

    longest = max(map(len, prompts))
    starts_b = torch.tensor([longest - len(prompt) for prompt in prompts], device=model.device)
    tokens_bs = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    context = StaticInferenceContext(len(prompts), longest + max_new_tokens)
    first = 0
    for _ in range(max_new_tokens):
        end = first + tokens_bs.shape[1]
        positions_bs = torch.arange(first, end, device=model.device).expand_as(tokens_bs)
        logits_b1V = model.module(tokens_bs, positions_bs, _hidden(starts_b, first, end), inference_context=context,
                                  runtime_gather_output=True)
        context.increment_sequence_len_offset(end - first)
        chosen: list[int] = []
        yield logits_b1V[:, -1].float(), chosen
        tokens_bs = torch.tensor(chosen, device=model.device)[:, None]
        first = end


@torch.no_grad()
def _generate_batch(model: "Model", prompts: Sequence[list[int]], results: Sequence[Generation], sampling: Sampling,
                    generators: Sequence[torch.Generator], progress: Callable[[int], object] | None) -> None:
    eod, known = model.tokenizer.eod, model.tokenizer.vocab_size
    active = [True] * len(prompts)
    share_bE = torch.zeros(len(prompts), len(model.expert_names))
    counts_b = torch.zeros(len(prompts))
    with RoutingWeights(model.module) as routing:
        for logits_bV, chosen in _steps(model, prompts, sampling.max_new_tokens):
            logits_bV = logits_bV[:, :known].cpu()  # the rest of the vocabulary is padding
            if not logits_bV[active].isfinite().all():
                raise FlexOlmoError("the model's logits are not finite numbers: its weights, or those of an expert "
                                    "that was to be used, are damaged")
            active_b = torch.tensor(active)
            counts_b += active_b
            if model.expert_names:
                share_bE += routing.mean_over_layers()[-1].cpu() * active_b[:, None]
            chosen.extend(_choose(logits_bV, sampling, generators))
            if progress is not None:
                progress(sum(active))
            for row, token in enumerate(chosen):
                if active[row] and token == eod:
                    active[row], results[row].finish = False, "eod"
                elif active[row]:
                    results[row].tokens.append(token)
            if not any(active):
                break
    for result, share_E, count in zip(results, share_bE, counts_b, strict=True):
        result.text = model.tokenizer.decode(result.tokens)
        result.routing_share = dict(zip(model.expert_names, (share_E / count).tolist(), strict=True))


def _encode(model: "Model", prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    encoded = []
    longest = model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise FlexOlmoError(f"prompts[{index}] = {prompt!r}: expected a text")
        # A document follows the end of another one, so that token starts an empty prompt.
        tokens = model.tokenizer.encode(prompt) or [model.tokenizer.eod]
        if len(tokens) + max_new_tokens > longest:
            raise FlexOlmoError(f"prompt {index + 1} has {len(tokens)} tokens, with max_new_tokens = {max_new_tokens} "
                                f"that is {len(tokens) + max_new_tokens}: expected at most "
                                f"model.max_position_embeddings = {longest}")
        encoded.append(tokens)
    return encoded


def generate(model: "Model", prompts: Sequence[str], sampling: Sampling, experts: Experts = None, batch_size: int = 8,
             progress: Callable[[int], object] | None = None) -> list[Generation]:
    """Continue each prompt; see ``Model.generate``, which has the same arguments."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise FlexOlmoError(f"batch_size = {batch_size!r}: expected at least 1")
    if not isinstance(prompts, Iterable):
        raise FlexOlmoError(f"prompts = {prompts!r}: expected a text or a list of texts")
    prompts = list(prompts)
    encoded = _encode(model, prompts, sampling.max_new_tokens)
    allowed_BE = allowed_experts(experts, model.expert_names, len(prompts))
    results = [Generation(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + index) for index in range(len(prompts))]
    for row, result in enumerate(results):
        result.rows = model.rows_used(None if allowed_BE is None else named(allowed_BE[row], model.expert_names))
    for router_rows, members in model.by_rows(allowed_BE, len(prompts)):
        by_length = sorted(members, key=lambda index: len(encoded[index]))  # less padding
        for start in range(0, len(members), batch_size):
            rows = by_length[start : start + batch_size]
            mask = None if allowed_BE is None else allowed_BE[rows]
            with using_rows(model.module, router_rows), only_allowed(model.module, mask):
                _generate_batch(model, [encoded[row] for row in rows], [results[row] for row in rows], sampling,
                                [generators[row] for row in rows], progress)
    return results
