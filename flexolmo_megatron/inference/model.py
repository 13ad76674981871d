"""A model in memory, on one process: logits and text, with all experts or only some of them.

Built from the local modules of ``model/spec.py`` even where Transformer Engine is installed: its attention takes no
mask for left-padded prompts, and exactness matters more here than speed. To serve at scale, export to Hugging Face.

Legend: b sequences, s positions, V vocabulary, E experts.
"""

import gc
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexolmo_megatron.config.card import ModelCard, RowSet
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.lazy import LazyTensor
from flexolmo_megatron.convert.model import open_model, others
from flexolmo_megatron.convert.rows import Choice, choose, describe_choice
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.inference.access import Experts, Names, Rows, allowed_experts, named, only_allowed, using_rows
from flexolmo_megatron.inference.fixed_order import fixed_order
from flexolmo_megatron.inference.pair import couple, open_anchor
from flexolmo_megatron.training.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from flexolmo_megatron.inference.generate import Generation


class Model:
    """What ``load_model`` returns."""

    def __init__(self, module: nn.Module, card: ModelCard, device: torch.device, rows: Choice = "strict",
                 other_rows: dict[str, Rows] | None = None) -> None:
        self.module = module
        """Megatron's GPTModel, in evaluation mode."""
        self.card = card
        """What the model is; for a pair, of the two-expert model."""
        self.device = device
        self.rows = rows
        """Which router rows are used, if the router was tuned; see ``load_model``."""
        self._other_rows = other_rows or {}

    def __repr__(self) -> str:
        names = ", ".join(self.expert_names)
        experts = f"experts {names} ({self.config.top_k} active)" if names else "dense"
        return f"<Model: {self.config.num_layers} layers, {experts}, on {self.device}>"

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.card.model

    @property
    def expert_names(self) -> list[str]:
        """In the order of the router's rows, the anchor's first; empty for a dense model."""
        return self.card.expert_names

    def row_set(self, experts: Names | None = None) -> RowSet | None:
        """Return the router rows that an answer with these experts uses (None for all); None if none were ever tuned.

        ``RowSet.depends_on`` says whether an expert has shaped them.
        """
        return choose(self.card.row_sets, self._excluded(experts), self.rows)

    def rows_used(self, experts: Names | None = None) -> str:
        """Say which router rows these are and, where experts are left out, what guarantee holds: "untuned (strict)".

        strict: nothing that was derived from the left-out owners' data remains; expert-only: the experts are gone, but
        have shaped the rows. Empty if the router was never tuned.
        """
        return describe_choice(self.row_set(experts), self._excluded(experts))

    def _excluded(self, experts: Names | None) -> list[str]:
        return [] if experts is None else [name for name in self.expert_names if name not in experts]

    def by_rows(self, allowed_bE: Tensor | None, batch_size: int) -> list[tuple[Rows | None, list[int]]]:
        """Group the sequences of a batch by the router rows that each must use, for ``access.using_rows``."""
        if allowed_bE is None or not self.card.row_sets:
            chosen = [self.row_set()] * batch_size
        else:
            chosen = [self.row_set(named(allowed_E, self.expert_names)) for allowed_E in allowed_bE]
        groups: dict[str, list[int]] = {}
        for sequence, rows in enumerate(chosen):
            groups.setdefault(rows.name if rows else "", []).append(sequence)
        return [(self._other_rows.get(name), members) for name, members in groups.items()]

    def experts_without(self, *names: str) -> list[str]:
        """Return the names of all experts but these, as ``logits`` and ``generate`` take them.

        Raises:
            FlexOlmoError: an unknown name, or the public expert, which no answer can do without.
        """
        return others(names, self.expert_names)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            FlexOlmoError: it cannot be loaded, or has more ids than the model.
        """
        tokenizer = load_tokenizer(self.card.tokenizer)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise FlexOlmoError(f"the tokenizer {tokenizer.spec} has {tokenizer.vocab_size} ids: expected at most "
                                f"model.vocab_size = {self.config.vocab_size}")
        return tokenizer

    @torch.no_grad()
    def logits(self, tokens: Tensor | Sequence[Sequence[int]], experts: Experts = None, *,
               exact: bool = True) -> Tensor:
        """Compute the logits of every position.

        Args:
            tokens: ids `[b, s]`.
            experts: names of the experts to use, among them "public": one list (or set) for the batch or one per
                sequence; None for all; see ``experts_without``. The others have no influence, and top-k becomes at most
                the number of those left.
            exact: compute each sequence by itself, so that its logits do not depend, not even in rounding, on the rest
                of the batch. False computes the whole batch at once, which is faster for many short sequences.

        Returns:
            fp32 `[b, s, V]`, on the model's device.

        Raises:
            FlexOlmoError: tokens or experts are not of that form; see ``check_tokens`` and ``access.allowed_experts``.
        """
        tokens_bs = check_tokens(tokens, self.config).to(self.device)
        allowed_bE = allowed_experts(experts, self.expert_names, len(tokens_bs))
        logits_bsV = torch.empty(0)
        for rows, members in self.by_rows(allowed_bE, len(tokens_bs)):
            with using_rows(self.module, rows):
                for part in torch.tensor(members).split(1 if exact else len(members)):
                    part_bsV = self._forward(tokens_bs[part], None if allowed_bE is None else allowed_bE[part])
                    if len(part) == len(tokens_bs):
                        return part_bsV
                    if not len(logits_bsV):
                        logits_bsV = part_bsV.new_empty(len(tokens_bs), *part_bsV.shape[1:])
                    logits_bsV[part] = part_bsV
        return logits_bsV

    def _forward(self, tokens_bs: Tensor, allowed_bE: Tensor | None) -> Tensor:
        positions_bs = torch.arange(tokens_bs.shape[1], device=self.device).expand_as(tokens_bs)
        with only_allowed(self.module, allowed_bE), fixed_order():
            return self.module(tokens_bs, positions_bs, attention_mask=None).float()

    def generate(self, prompts: str | Sequence[str], *, experts: Experts = None, max_new_tokens: int = 64,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, batch_size: int = 8,
                 progress: Callable[[int], object] | None = None) -> "list[Generation]":
        """Continue each prompt until it ends its document or ``max_new_tokens`` are reached.

        Args:
            prompts: texts; an empty one starts a new document.
            experts: as for ``logits``.
            max_new_tokens: at most so many tokens per prompt.
            temperature: 0 takes the most probable token; above 0 samples from the logits divided by it.
            top_k: sample among so many most probable tokens; 0 for all.
            top_p: sample among the most probable tokens that together reach this probability.
            seed: of the sampling; each prompt has its own random numbers, whatever it is batched with.
            batch_size: prompts that are computed at a time.
            progress: called after each step with the number of tokens that it added.

        Returns:
            One ``Generation`` per prompt, in order.

        Raises:
            FlexOlmoError: a setting is impossible, or a prompt with its continuation is longer than the model allows.
        """
        from flexolmo_megatron.inference.generate import Sampling, generate

        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
        return generate(self, [prompts] if isinstance(prompts, str) else prompts, sampling, experts, batch_size,
                        progress)


def check_tokens(tokens: Any, config: ModelConfig) -> Tensor:
    """Return ``tokens`` as int64 `[b, s]`.

    Raises:
        FlexOlmoError: not integers of that shape, none at all, an id outside the vocabulary, or a sequence longer than
            ``max_position_embeddings``.
    """
    try:
        tokens_bs = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FlexOlmoError(f"tokens cannot be made a tensor of token ids of shape [b, s]: {error}") from error
    if tokens_bs.numel() == 0:
        raise FlexOlmoError(f"tokens of shape {list(tokens_bs.shape)} are empty: expected at least one token")
    if tokens_bs.ndim != 2:
        raise FlexOlmoError(f"tokens of shape {list(tokens_bs.shape)}: expected [b, s], sequences by positions")
    if tokens_bs.is_floating_point() or tokens_bs.is_complex() or tokens_bs.dtype == torch.bool:
        raise FlexOlmoError(f"tokens of type {tokens_bs.dtype}: expected integers, the ids of tokens")
    if tokens_bs.shape[1] > config.max_position_embeddings:
        raise FlexOlmoError(f"sequences of {tokens_bs.shape[1]} tokens: expected at most "
                            f"model.max_position_embeddings = {config.max_position_embeddings}")
    tokens_bs = tokens_bs.long()
    outside = ((tokens_bs < 0) | (tokens_bs >= config.vocab_size)).nonzero()
    if len(outside):
        row, position = outside[0].tolist()
        raise FlexOlmoError(f"token id {tokens_bs[row, position].item()} in sequence {row} at position {position}: "
                            f"expected 0 to {config.vocab_size - 1}, the model's vocabulary")
    return tokens_bs


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()  # modules and their hooks refer to one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(path: str | os.PathLike, dtype: torch.dtype = torch.float32, *,
               anchor: str | os.PathLike | None = None, rows: Choice = "strict") -> Model:
    """Load a model onto this process's GPU, or without one onto the CPU.

    Without CUDA this puts stand-ins for ``torch.cuda`` into torch and Megatron, for the rest of the process; see
    ``flexolmo_megatron.load_model``, which has the same arguments, and ``runtime/cpu.py``.

    Raises:
        FlexOlmoError: there is no such model, it is damaged, or a pair's anchor is missing or another one.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise FlexOlmoError(f"dtype = {dtype}: expected torch.float32 or torch.bfloat16")
    lazy = open_model(path)
    if lazy.card.kind == "pair":
        lazy = couple(open_anchor(lazy, anchor), lazy)

    from flexolmo_megatron.runtime.setup import initialize, local_device

    initialize()
    from flexolmo_megatron.model.builder import block_spec, build_model
    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.model.spec import TorchSpecProvider
    from flexolmo_megatron.model.weights import load_weights

    card = lazy.card
    choose(card.row_sets, (), rows)  # refuses another word
    config = transformer_config(card.model, card.kind, dtype=dtype, perform_initialization=False)
    module = build_model(card.model, card.kind, config, spec=block_spec(card.kind, config, TorchSpecProvider()))
    load_weights(module, lazy)
    module.requires_grad_(False)
    device = local_device()
    other_rows = {name: _rows(card.model, tensors, dtype, device) for name, tensors in lazy.other_rows.items()}
    return Model(module.to(device).eval(), card, device, rows, other_rows)


def _rows(config: ModelConfig, tensors: dict[str, LazyTensor], dtype: torch.dtype, device: torch.device) -> Rows:
    """Read one set of router rows and biases."""
    rows: Rows = []
    for layer in range(config.num_layers):
        bias = tensors.get(f"model.layers.{layer}.mlp.gate.bias")
        weight = tensors[f"model.layers.{layer}.mlp.gate.weight"].read()
        rows.append((weight.to(device, dtype), None if bias is None else bias.read().to(device)))
    return rows
