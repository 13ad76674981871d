"""The anchor as embedder: what each layer's router will read, averaged over a document.

Needs nothing but the anchor. Runs on one process, on its GPU where there is one.

Legend: n documents, S positions, P pieces of documents, T tokens, h hidden size, L layers.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.tokenizer import load_tokenizer


class AnchorEmbedder:
    """Mean over a document's tokens of the residual stream before each layer's FFN, un-normed as the router reads it.

    The published anchor is computed as the dense model within it, so that coordinator and owners get the same numbers.
    """

    name = "anchor"

    def __init__(self, anchor: LazyModel, dense_digest: str, max_tokens: int) -> None:
        """Load the weights.

        Args:
            anchor: dense or published.
            dense_digest: of the anchor.
            max_tokens: tokens of a document that are read, in pieces where the anchor's longest sequence is shorter.

        Raises:
            FlexOlmoError: the model has several experts, or its tokenizer cannot be loaded or does not fit.
        """
        from flexolmo_megatron.runtime.setup import initialize, local_device

        initialize()
        from flexolmo_megatron.model.builder import build_model
        from flexolmo_megatron.model.config import transformer_config
        from flexolmo_megatron.model.weights import load_weights

        dense = as_dense(anchor)
        model = dense.card.model
        self.digest = dense_digest
        self.max_tokens = max_tokens
        self.reading = f"{max_tokens} tokens"
        self.tokenizer = load_tokenizer(dense.card.tokenizer)
        if self.tokenizer.vocab_size > model.vocab_size:
            raise FlexOlmoError(f"the anchor's tokenizer {self.tokenizer.spec} has {self.tokenizer.vocab_size} ids: "
                                f"expected at most model.vocab_size = {model.vocab_size}")
        dtype = dense.tensors["lm_head.weight"].dtype
        self.device = local_device()
        self.gpt = build_model(model, "dense", transformer_config(model, "dense", dtype=dtype)).to(self.device).eval()
        load_weights(self.gpt, dense)
        # forward then returns hidden states: logits, the largest tensor by far, are not needed.
        self.gpt.post_process = False

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `[n, L, h]`; NaN for a document without a token."""
        means: list[torch.Tensor] = []
        documents_P = self._read(texts, lambda states_SPh, weight_SP: means.append(
            torch.einsum("sph,sp->ph", states_SPh, weight_SP)))
        parts_PLh = torch.stack(means, dim=1)
        return parts_PLh.new_zeros(len(texts), *parts_PLh.shape[1:]).index_add_(0, documents_P, parts_PLh).cpu().numpy()

    def add_moments(self, texts: Sequence[str], means_Lh: torch.Tensor, products_Lhh: torch.Tensor) -> None:
        """Add the mean states x and the mean products x x^T of documents, each with a token at least.

        Args:
            texts: documents.
            means_Lh, products_Lhh: float64, on ``device``; added to.
        """
        layers = iter(range(len(means_Lh)))

        def record(states_SPh: torch.Tensor, weight_SP: torch.Tensor) -> None:
            layer = next(layers)
            states_Th, weight_T = states_SPh.double().flatten(0, 1), weight_SP.double().flatten()
            means_Lh[layer] += weight_T @ states_Th
            products_Lhh[layer].addmm_(states_Th.T * weight_T, states_Th)

        self._read(texts, record)

    @torch.no_grad()
    def _read(self, texts: Sequence[str], record: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        """Compute documents, and call ``record`` for each layer with its states and the tokens' weights.

        Those are fp32 `[S, P, h]` and `[S, P]`, for pieces of documents that are no longer than the model allows. The
        weights of a document's tokens add up to 1, and are NaN where there is none.

        Returns:
            The document that each piece is from, int64 `[P]`.
        """
        documents = [self.tokenizer.encode(text)[: self.max_tokens] for text in texts]
        longest = self.gpt.max_sequence_length
        pieces = [(number, tokens[start : start + longest]) for number, tokens in enumerate(documents)
                  for start in range(0, max(1, len(tokens)), longest)]
        # Padding comes after a piece, where causal attention keeps it from having any effect on it.
        tokens_PS = torch.full((len(pieces), max(1, *(len(piece) for _, piece in pieces))), self.tokenizer.eod)
        for row, (_, piece) in zip(tokens_PS, pieces, strict=True):
            row[: len(piece)] = torch.tensor(piece, dtype=torch.int64)
        positions_S = torch.arange(tokens_PS.shape[1])
        sizes_P, whole_P = torch.tensor([(len(piece), len(documents[number])) for number, piece in pieces]).unbind(1)
        weight_SP = ((positions_S[:, None] < sizes_P) / whole_P).to(self.device)

        def listen(layer: torch.nn.Module, arguments: tuple) -> None:
            record(arguments[0].float(), weight_SP)

        positions_PS = positions_S.expand_as(tokens_PS)
        handles = [layer.mlp.register_forward_pre_hook(listen) for layer in self.gpt.decoder.layers]
        try:
            self.gpt(tokens_PS.to(self.device), positions_PS.to(self.device), attention_mask=None)
        finally:
            for handle in handles:
                handle.remove()
        return torch.tensor([number for number, _ in pieces], device=self.device)
