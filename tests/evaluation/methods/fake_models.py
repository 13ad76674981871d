"""Stand-ins for models whose probabilities are known: four tokens, and logits that are the logarithm of weights."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.evaluation.methods import Store
from flexolmo_megatron.training.tokenizer import Tokenizer

VOCAB = 4


class Letters(Tokenizer):
    """a, b, c are tokens 0, 1, 2; 3 ends a document."""

    spec = {"type": "letters"}
    eod = 3
    vocab_size = VOCAB

    def encode(self, text: str) -> list[int]:
        return ["abc".index(letter) for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join("abc"[token] for token in ids)


def constant(*weights: float) -> Callable[[Tensor], Tensor]:
    """Logits ln(weights), whatever the tokens before."""
    return lambda tokens: torch.tensor(weights).log().expand(*tokens.shape, VOCAB).clone()


def contextual(factor: float) -> Callable[[Tensor], Tensor]:
    """Logits that depend on all tokens up to this one and on nothing later."""
    def compute(tokens: Tensor) -> Tensor:
        context = (tokens * torch.arange(1, tokens.shape[1] + 1)).cumsum(dim=1)
        return torch.sin(context[..., None] * factor + torch.arange(VOCAB) * 1.7)

    return compute


class FakeModel:
    """Computes its logits `[b, s, V]` with a function of the tokens `[b, s]`, and keeps what it was asked for."""

    def __init__(self, compute: Callable[[Tensor], Tensor], length: int = 64) -> None:
        self.compute = compute
        self.config = ModelConfig(max_position_embeddings=length)
        self.tokenizer = Letters()
        self.module = nn.Module()
        self.rows = "strict"
        self.expert_names: list[str] = []
        self.asked: list[Tensor] = []

    def logits(self, tokens: Tensor, experts: Sequence[str] | None = None, *, exact: bool = True) -> Tensor:
        assert not exact and experts is None
        self.asked.append(tokens)
        return self.compute(tokens)


class FakeStore(Store):
    """A store of models in memory."""

    def __init__(self, folder: Path, models: dict[str, FakeModel], **options: int) -> None:
        self.fakes = {folder / name: model for name, model in models.items()}
        self.loaded: list[str] = []
        for path in self.fakes:
            path.mkdir(parents=True, exist_ok=True)
            (path / "weights").write_text(path.name)

        def load(path: Path, dtype: torch.dtype) -> FakeModel:
            self.loaded.append(path.name)
            return self.fakes[path]

        super().__init__(folder / "log_probs", load=load, **options)

    @property
    def paths(self) -> list[Path]:
        return list(self.fakes)
