"""Text from a model: greedy or sampled, batched, with a key/value cache and attribution.

Prompts of unequal length are padded on the left. Padding is hidden from attention, and RoPE only knows distances, so a
prompt's continuation does not depend on what it is batched with, up to rounding.

Legend: b sequences, s positions of the padded prompts, t positions so far, V vocabulary, E experts.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.inference.access import Experts, allowed_experts, named, only_allowed, routers_of, using_rows
from flexolmo_megatron.inference.attribution import RoutingWeights
from flexolmo_megatron.inference.fixed_order import fixed_order
from flexolmo_megatron.untrusted import shown

if TYPE_CHECKING:
    from flexolmo_megatron.inference.model import Model
    from flexolmo_megatron.training.tokenizer import Tokenizer

_SEEDS = 2**32
"""Each prompt's seed follows from that of the sampling, and must stay below torch's limit of 2**64."""


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
        if not 0 <= self.seed < _SEEDS:
            raise FlexOlmoError(f"seed = {self.seed}: expected 0 to {_SEEDS - 1}")


@dataclass
class Generation:
    """The continuation of one prompt."""

    prompt: str
    text: str = ""
    """The continuation alone."""
    tokens: list[int] = field(default_factory=list)
    """Its ids, without the end-of-document token; of an answer that a text has ended, with that text's."""
    finish: Literal["eod", "stop", "length"] = "length"
    """Whether the model ended the document, wrote a text that ends answers, or max_new_tokens were reached."""
    routing_share: dict[str, float] = field(default_factory=dict)
    """Expert name -> its share of the routing weight, the mean over layers and generated tokens (the end-of-document
    token counts); sums to one. Empty for a dense model."""
    rows: str = ""
    """Of a model with a tuned router: the rows that were used, and the guarantee where experts were left out; see
    ``Model.rows_used``."""


def kept_tokens(logits_bV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Leave out what temperature (above 0), then top-k, then top-p leave out.

    Returns:
        The probabilities of the k tokens that may be kept, `[b, k]`, from large to small and 0 for those that top-p
        leaves out, not scaled to sum to one again; and their ids `[b, k]`.
    """
    logits_bV = logits_bV / sampling.temperature
    if 0 < sampling.top_k < logits_bV.shape[-1]:
        logits_bk, ids_bk = logits_bV.topk(sampling.top_k, dim=-1)
    else:
        logits_bk, ids_bk = logits_bV.sort(dim=-1, descending=True)
    probs_bk = logits_bk.softmax(dim=-1)
    if sampling.top_p < 1:
        # A token stays if those before it do not yet reach top_p; the first one always does.
        late_bk = probs_bk.cumsum(dim=-1) - probs_bk >= sampling.top_p
        late_bk[:, 0] = False
        probs_bk = probs_bk.masked_fill(late_bk, 0.0)
    return probs_bk, ids_bk


def _choose(logits_bV: Tensor, sampling: Sampling, uniform_b: Tensor) -> list[int]:
    """Choose a token for each sequence where its random number, from 0 to 1, falls among the probabilities' sums."""
    if sampling.temperature == 0:
        return logits_bV.argmax(dim=-1).tolist()
    probs_bk, ids_bk = kept_tokens(logits_bV, sampling)
    sums_bk = probs_bk.double().cumsum(dim=-1)
    places_b1 = torch.searchsorted(sums_bk, uniform_b.to(sums_bk)[:, None] * sums_bk[:, -1:], right=True)
    last_b1 = (probs_bk > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not lead to a token that is left out
    return ids_bk.gather(1, places_b1.minimum(last_b1)).flatten().tolist()


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


def _steps(model: "Model", prompts: Sequence[list[int]], max_new_tokens: int) -> Generator[tuple[Tensor, list[int]]]:
    """Run the prompts, then one token after the other.

    Yields:
        fp32 logits `[b, V]` for the next token of each sequence, and a list to be filled with the chosen ids.
    """
    from megatron.core.inference.contexts import StaticInferenceContext

    from flexolmo_megatron.model.router_window import remembered

    longest = max(map(len, prompts))
    starts_b = torch.tensor([longest - len(prompt) for prompt in prompts], device=model.device)
    tokens_bs = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    context = StaticInferenceContext(len(prompts), longest + max_new_tokens)
    first = 0
    with remembered(routers_of(model.module), starts_b):
        for _ in range(max_new_tokens):
            end = first + tokens_bs.shape[1]
            positions_bs = torch.arange(first, end, device=model.device).expand_as(tokens_bs)
            with fixed_order():
                logits_b1V = model.module(tokens_bs, positions_bs, _hidden(starts_b, first, end),
                                          inference_context=context, runtime_gather_output=True)
            context.increment_sequence_len_offset(end - first)
            chosen: list[int] = []
            yield logits_b1V[:, -1].float(), chosen
            tokens_bs = torch.tensor(chosen, device=model.device)[:, None]
            first = end


class _StopStrings:
    """Finds the texts that end an answer in the tokens that it has so far."""

    def __init__(self, texts: Sequence[str], tokenizer: "Tokenizer") -> None:
        self._texts, self._tokenizer = [text for text in texts if text], tokenizer
        # No token is shorter than a byte, and a few more let a cut character be decoded.
        self._tail = max((len(text.encode("utf-8")) for text in self._texts), default=0) + 4

    def reached(self, tokens: list[int]) -> bool:
        """Whether the latest token has completed one."""
        if not self._texts:
            return False
        tail = self._tokenizer.decode(tokens[-self._tail:])
        return any(text in tail for text in self._texts)

    def cut(self, text: str) -> str:
        """The text before the first one."""
        return text[:min((place for stop in self._texts if (place := text.find(stop)) >= 0), default=len(text))]


@torch.no_grad()
def _generate_batch(model: "Model", prompts: Sequence[list[int]], results: Sequence[Generation], sampling: Sampling,
                    seeds: Sequence[int], stop: _StopStrings, progress: Callable[[int], object] | None) -> None:
    eod, known = model.tokenizer.eod, model.tokenizer.vocab_size
    active = [True] * len(prompts)
    share_bE = torch.zeros(len(prompts), len(model.expert_names))
    counts_b = torch.zeros(len(prompts))
    uniform_bt = torch.stack([
        torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds])
    with (RoutingWeights(model.module) as routing,
          contextlib.closing(_steps(model, prompts, sampling.max_new_tokens)) as steps):
        for step, (logits_bV, chosen) in enumerate(steps):
            logits_bV = logits_bV[:, :known]  # the rest of the vocabulary is padding
            if not logits_bV[active].isfinite().all():
                raise FlexOlmoError("the model's logits are not finite numbers: its weights, or those of an expert "
                                    "that was to be used, are damaged")
            active_b = torch.tensor(active)
            counts_b += active_b
            if model.expert_names:
                share_bE += routing.mean_over_layers()[-1].cpu() * active_b[:, None]
            chosen.extend(_choose(logits_bV, sampling, uniform_bt[:, step]))
            if progress is not None:
                progress(sum(active))
            for row, token in enumerate(chosen):
                if not active[row]:
                    continue
                if token == eod:
                    active[row], results[row].finish = False, "eod"
                    continue
                results[row].tokens.append(token)
                if stop.reached(results[row].tokens):
                    active[row], results[row].finish = False, "stop"
            if not any(active):
                break
    for result, share_E, count in zip(results, share_bE, counts_b, strict=True):
        result.text = stop.cut(model.tokenizer.decode(result.tokens))
        result.routing_share = dict(zip(model.expert_names, (share_E / count).tolist(), strict=True))


def _encode(model: "Model", prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    encoded = []
    longest = model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise FlexOlmoError(f"prompts[{index}] = {prompt!r}: expected a text")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:  # an undecodable argument, or JSON, brought half a surrogate pair
            raise FlexOlmoError(f"prompts[{index}] = {shown(prompt)}: expected text that UTF-8 can hold") from None
        # A document follows the end of another one, so that token starts an empty prompt.
        tokens = model.tokenizer.encode(prompt) or [model.tokenizer.eod]
        if len(tokens) + max_new_tokens > longest:
            raise FlexOlmoError(f"prompt {index + 1} has {len(tokens)} tokens, with max_new_tokens = {max_new_tokens} "
                                f"that is {len(tokens) + max_new_tokens}: expected at most "
                                f"model.max_position_embeddings = {longest}")
        encoded.append(tokens)
    return encoded


def generate_tokens(model: "Model", prompts: Sequence[list[int]], sampling: Sampling, *, seeds: Sequence[int],
                    experts: Experts = None, batch_size: int = 8, stop: Sequence[str] = (),
                    progress: Callable[[int], object] | None = None) -> list[Generation]:
    """Continue prompts that are token ids already.

    Args:
        model: of any kind.
        prompts: ids of each, at least one; with ``max_new_tokens`` no longer than the model allows.
        sampling: ``seed`` is not used.
        seeds: of each prompt's random numbers, which are the same whatever the prompt is batched with.
        experts: as for ``Model.logits``.
        batch_size: prompts that are computed at a time.
        stop: texts that end an answer, and are no part of it.
        progress: called after each step with the number of tokens that it added.

    Returns:
        One ``Generation`` per prompt, in order, with an empty ``prompt``.
    """
    allowed_BE = allowed_experts(experts, model.expert_names, len(prompts))
    results = [Generation("") for _ in prompts]
    stops = _StopStrings(stop, model.tokenizer)
    for row, result in enumerate(results):
        result.rows = model.rows_used(None if allowed_BE is None else named(allowed_BE[row], model.expert_names))
    for router_rows, members in model.by_rows(allowed_BE, len(prompts)):
        by_length = sorted(members, key=lambda index: len(prompts[index]))  # less padding
        for start in range(0, len(members), batch_size):
            rows = by_length[start : start + batch_size]
            mask = None if allowed_BE is None else allowed_BE[rows]
            with using_rows(model.module, router_rows), only_allowed(model.module, mask):
                _generate_batch(model, [prompts[row] for row in rows], [results[row] for row in rows], sampling,
                                [seeds[row] for row in rows], stops, progress)
    return results


def generate(model: "Model", prompts: Sequence[str], sampling: Sampling, experts: Experts = None, batch_size: int = 8,
             progress: Callable[[int], object] | None = None) -> list[Generation]:
    """Continue each prompt; see ``Model.generate``, which has the same arguments."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise FlexOlmoError(f"batch_size = {batch_size!r}: expected at least 1")
    if not isinstance(prompts, Iterable):
        raise FlexOlmoError(f"prompts = {prompts!r}: expected a text or a list of texts")
    prompts = list(prompts)
    encoded = _encode(model, prompts, sampling.max_new_tokens)
    seeds = [sampling.seed * 1_000_003 + index for index in range(len(prompts))]
    results = generate_tokens(model, encoded, sampling, seeds=seeds, experts=experts, batch_size=batch_size,
                              progress=progress)
    for prompt, result in zip(prompts, results, strict=True):
        result.prompt = prompt
    return results
