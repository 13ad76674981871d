"""The anchor as embedder: what each layer's router will read, averaged over a document.

Needs nothing but the anchor. Runs on one process, on its GPU where there is one.

Legend: s sequence, b batch, h hidden size, L layers.
"""

from collections.abc import Sequence

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
            max_tokens: tokens of a document that are read; at most the anchor's longest sequence is.

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
        self.max_tokens = min(max_tokens, model.max_position_embeddings)
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

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `[n, L, h]`; NaN for a document without a token."""
        documents = [self.tokenizer.encode(text)[: self.max_tokens] for text in texts]
        lengths = torch.tensor([len(tokens) for tokens in documents])
        # Padding comes after a document, where causal attention keeps it from having any effect on it.
        tokens_BS = torch.full((len(documents), max(1, int(lengths.max()))), self.tokenizer.eod)
        for row, tokens in zip(tokens_BS, documents, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        positions_S = torch.arange(tokens_BS.shape[1])
        weight_SB = ((positions_S[:, None] < lengths) / lengths).to(self.device)
        means: list[torch.Tensor] = []

        def record(layer: torch.nn.Module, arguments: tuple) -> None:
            means.append(torch.einsum("sbh,sb->bh", arguments[0].float(), weight_SB))

        positions_BS = positions_S.expand_as(tokens_BS)
        handles = [layer.mlp.register_forward_pre_hook(record) for layer in self.gpt.decoder.layers]
        try:
            self.gpt(tokens_BS.to(self.device), positions_BS.to(self.device), attention_mask=None)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(means, dim=1).cpu().numpy()
