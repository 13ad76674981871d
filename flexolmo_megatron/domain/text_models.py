"""Embedding models of others: any of sentence-transformers, and GritLM, the paper's.

One embedding for all layers, normalised for each document. No code that comes with a model is run: GritLM's repository
ships a modified Mistral for attention without a causal mask, but transformers' own Mistral takes such a mask, too.

Legend: n documents, s sequence, d dimension of the embedder.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from flexolmo_megatron.convert.safetensors_io import as_bytes
from flexolmo_megatron.domain.embed import display_name
from flexolmo_megatron.domain.vector import MAX_NAME
from flexolmo_megatron.errors import FlexOlmoError, first_line
from flexolmo_megatron.exchange.digest import DTYPE_NAMES, digest_tensors
from flexolmo_megatron.runtime.setup import local_device

GRITLM_INSTRUCTION = "<|embed|>\n"
"""Precedes every document, as https://github.com/ContextualAI/gritlm has it for documents without an instruction."""


def is_gritlm(name: str) -> bool:
    """Whether a model, by name or folder, is a GritLM: by its name, or by the code that its config.json names."""
    config = Path(name, "config.json")
    text = config.read_text(errors="replace") if config.is_file() else ""
    return "gritlm" in (display_name(name) + text).lower()


def check_installed(name: str) -> None:
    """Raise FlexOlmoError where the package that loads a model is missing, without importing it."""
    package = "transformers" if is_gritlm(name) else "sentence-transformers"
    if find_spec(package.replace("-", "_")) is None:
        raise _missing(name, package)


def _missing(name: str, package: str) -> FlexOlmoError:
    return FlexOlmoError(f"the embedder {name!r} needs {package}; install it with: pip install {package}")


def _cannot_load(name: str, error: Exception) -> FlexOlmoError:
    return FlexOlmoError(f"cannot load the embedder {name!r}: expected 'anchor', or the name or folder of a "
                         f"sentence-transformers or GritLM model ({first_line(error)})")


def _weights_digest(model: torch.nn.Module) -> str:
    state = model.state_dict()
    return digest_tensors(
        (name, DTYPE_NAMES[state[name].dtype], tuple(state[name].shape), [as_bytes(state[name].cpu().contiguous())])
        for name in sorted(state, key=str.encode)
    )


def _reading(max_tokens: int, poolings: Sequence[str], prompt: str | None) -> str:
    """As in ``Embedder.reading``."""
    parts = [f"{max_tokens} tokens", *(f"{pooling} pooling" for pooling in poolings)]
    return ", ".join([*parts, f"after {prompt!r}"] if prompt else parts)[:MAX_NAME]


def _poolings(model: torch.nn.Module) -> list[str]:
    """How the modules of a sentence-transformers model make one embedding of a text's tokens."""
    found = []
    for module in model.modules():
        if hasattr(module, "get_pooling_mode_str"):  # of 3.4, say; 6.2 has the other
            found.append(set(module.get_pooling_mode_str().split("+")))
        elif modes := getattr(module, "pooling_mode", None):
            found.append({modes} if isinstance(modes, str) else set(modes))
    return ["+".join(sorted(modes)) for modes in found]


class SentenceTransformerEmbedder:
    """A model that the sentence-transformers package loads, with the pooling that it brings."""

    def __init__(self, name: str, max_tokens: int) -> None:
        """Load a model by name or folder; ``max_tokens`` can only shorten what it reads of a document.

        Raises:
            FlexOlmoError: the package is missing, or it cannot load the model.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise _missing(name, "sentence-transformers") from None
        try:
            self._model = SentenceTransformer(name, device=str(local_device()), trust_remote_code=False)
        except Exception as error:  # it passes on whatever its many readers raise
            raise _cannot_load(name, error) from error
        self._model.max_seq_length = min(self._model.max_seq_length or max_tokens, max_tokens)
        self.name = display_name(name)
        self.reading = _reading(self._model.max_seq_length, _poolings(self._model),
                                self._model.prompts.get(self._model.default_prompt_name))
        self.digest = _weights_digest(self._model)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `[n, 1, d]`, of norm 1."""
        embeddings = self._model.encode(list(texts), batch_size=len(texts), normalize_embeddings=True,
                                        convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(embeddings, dtype=np.float32)[:, None]


class GritLMEmbedder:
    """GritLM's embedding mode: every token sees the whole document, the mean is over the document's tokens alone."""

    def __init__(self, name: str, max_tokens: int) -> None:
        """Load a model by name or folder; ``max_tokens`` includes those of the instruction.

        Raises:
            FlexOlmoError: transformers is missing, or it cannot load the model.
        """
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise _missing(name, "transformers") from None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", trust_remote_code=False)
            model = AutoModel.from_pretrained(name, dtype="auto", attn_implementation="sdpa", trust_remote_code=False)
        except Exception as error:  # transformers passes on whatever its many readers raise
            raise _cannot_load(name, error) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._device = local_device()
        self._model = model.to(self._device).eval()
        self._instruction_tokens = len(self._tokenizer(GRITLM_INSTRUCTION)["input_ids"])
        if max_tokens <= self._instruction_tokens:
            raise FlexOlmoError(f"--max-tokens {max_tokens}: expected more than the {self._instruction_tokens} tokens "
                                "of GritLM's instruction")
        self.max_tokens = max_tokens
        self.name = display_name(name)
        self.reading = _reading(max_tokens, ["mean"], GRITLM_INSTRUCTION)
        self.digest = _weights_digest(model)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `[n, 1, d]`, of norm 1; NaN for a document without a token."""
        inputs = self._tokenizer([GRITLM_INSTRUCTION + text for text in texts], padding=True, truncation=True,
                                 max_length=self.max_tokens, return_tensors="pt").to(self._device)
        real_NS = inputs["attention_mask"].bool()
        # A mask of four dimensions is used as it is: no causal one is added.
        seen_N1SS = real_NS[:, None, None, :].expand(-1, 1, real_NS.shape[1], -1)
        output = self._model(inputs["input_ids"], attention_mask=seen_N1SS, use_cache=False)
        hidden_NSd = output.last_hidden_state.float()
        pooled_NS = real_NS.clone()
        pooled_NS[:, : self._instruction_tokens] = False
        mean_Nd = torch.einsum("nsd,ns->nd", hidden_NSd, pooled_NS.float()) / pooled_NS.sum(dim=1, keepdim=True)
        return torch.nn.functional.normalize(mean_Nd, dim=-1)[:, None].cpu().numpy()
