"""Our models as lm-evaluation-harness sees a language model: log-likelihoods and continuations of texts.

Requests are answered as its own HFLM (lm_eval/models/huggingface.py, 0.4.13) answers them for an exported model, with
two differences: text is tokenized as text, so no text turns into a special token; and a sampled continuation follows
from the seed and its prompt alone, not from what else is in the batch.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.hashing import hash64
from flexolmo_megatron.inference.generate import Sampling, generate_tokens
from flexolmo_megatron.inference.model import Model

_DEFAULT_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """A model with all or some of its experts."""

    def __init__(self, model: Model, experts: Sequence[str] | None = None, *, batch_size: int = 8,
                 seed: int = 0) -> None:
        """Wrap ``model``.

        Args:
            model: of any kind.
            experts: the only experts to use, by name, "public" among them; None for all.
            batch_size: sequences that are computed at a time.
            seed: of sampled continuations.
        """
        super().__init__()
        self.model, self.experts, self.batch_size, self.seed = model, experts, batch_size, seed
        self.truncated = 0
        """Requests so far whose context has lost its beginning, since the model takes no longer sequences."""

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eod

    @property
    def max_length(self) -> int:
        """Tokens of a sequence, at most."""
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.tokenizer.spec)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or None)  # None: a bar on a terminal, none in a log

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Equal inputs (the choices of a question that are one token each) are computed once.
        inputs: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise FlexOlmoError(f"a task asks for the likelihood of {len(continuation)} tokens at once: the model "
                                    f"takes {self.max_length}")
            tokens = context + continuation
            self.truncated += len(tokens) > self.max_length + 1
            inputs[tuple(tokens[-(self.max_length + 1):][:-1])].append(index)
        ordered = sorted(inputs, key=len, reverse=True)
        for start in tqdm(range(0, len(ordered), self.batch_size), "log-likelihoods", unit=" batches", leave=False,
                          disable=True if disable_tqdm else None):
            batch = ordered[start:start + self.batch_size]
            tokens_bs = torch.full((len(batch), len(batch[0])), self.eot_token_id)
            for row, tokens in enumerate(batch):
                tokens_bs[row, :len(tokens)] = torch.tensor(tokens)
            logits_bsV = self.model.logits(tokens_bs, self.experts, exact=False)
            for tokens, logits_sV in zip(batch, logits_bsV, strict=True):
                for index in inputs[tokens]:
                    continuation = torch.tensor(requests[index][2], device=logits_sV.device)
                    if not len(continuation):
                        continue
                    log_probs_sV = logits_sV[len(tokens) - len(continuation):len(tokens)].log_softmax(dim=-1)
                    value = log_probs_sV.gather(1, continuation[:, None]).sum().item()
                    greedy = bool((log_probs_sV.argmax(dim=-1) == continuation).all())
                    answers[index] = value, greedy
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(token_list=self.tok_encode(request.args[0]),
                                                    prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                                                    context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(request.args[1])].append(index)
        answers, seen = [""] * len(requests), Counter()
        with tqdm(desc="continuations", total=len(requests), unit=" prompts", leave=False,
                  disable=True if disable_tqdm else None) as bar:
            for members in groups.values():
                settings = requests[members[0]].args[1]
                sampling, until = _sampling(settings)
                room = prompt_room(settings, self.max_length)
                members.sort(key=lambda index: len(requests[index].args[0]))
                for start in range(0, len(members), self.batch_size):
                    batch = members[start:start + self.batch_size]
                    prompts = [self.tok_encode(requests[index].args[0]) or [self.eot_token_id] for index in batch]
                    self.truncated += sum(len(prompt) > room for prompt in prompts)
                    prompts = [prompt[-room:] for prompt in prompts]
                    seeds = []
                    for index in batch:
                        text = requests[index].args[0]
                        seeds.append(hash64(self.seed, seen[text], text) >> 1)  # repeats of a prompt differ
                        seen[text] += 1
                    results = generate_tokens(self.model, prompts, sampling, seeds=seeds, experts=self.experts,
                                              batch_size=len(batch), stop=until)
                    for index, result in zip(batch, results, strict=True):
                        answers[index] = result.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, result.text)
                    bar.update(len(batch))
        return answers


def _sampling(settings: dict[str, Any]) -> tuple[Sampling, list[str]]:
    until = settings.get("until") or []
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    elif settings.get("do_sample") and "temperature" not in settings:
        temperature = 1.0
    sampling = Sampling(int(settings.get("max_gen_toks", _DEFAULT_NEW_TOKENS)), temperature,
                        int(settings.get("top_k", 0)), float(settings.get("top_p", 1.0)))
    return sampling, [until] if isinstance(until, str) else list(until)


def prompt_room(settings: dict[str, Any], max_length: int) -> int:
    """Tokens of a prompt, at most, beside the new ones that a task's ``generation_kwargs`` ask for.

    Raises:
        FlexOlmoError: there are none in a sequence of ``max_length`` tokens.
    """
    new_tokens = _sampling(settings)[0].max_new_tokens
    if new_tokens >= max_length:
        raise FlexOlmoError(f"a task asks for {new_tokens} new tokens, the model takes sequences of {max_length}: "
                            "expected at least one token less")
    return max_length - new_tokens
