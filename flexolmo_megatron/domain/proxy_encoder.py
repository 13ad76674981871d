"""A transformers encoder as proxy classifier, fine-tuned to tell an owner's documents from public ones.

The paper's is Snowflake's arctic-embed-xs (22 M parameters) with a learning rate of 3e-6. Any model that
``AutoModelForSequenceClassification`` loads will do; its classification head is made anew. One process, on its GPU
where there is one, in 32-bit floating point. No code that comes with a model is run.

Legend: n documents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexolmo_megatron.domain.embed import display_name
from flexolmo_megatron.errors import FlexOlmoError, first_line
from flexolmo_megatron.files import read_json, write_json
from flexolmo_megatron.runtime.setup import local_device
from flexolmo_megatron.training.progress import DocumentProgress

WARMUP = 0.1
"""Share of the steps over which the learning rate grows; then it falls linearly to 0."""
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
_OPTIONS = "options.json"


class EncoderClassifier:
    """A sequence classifier of two classes: public, and the owner's."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        """Take a model, its tokenizer, and how it was or is to be trained."""
        self._device = local_device()
        self._model = model.to(self._device).eval()
        self._tokenizer = tokenizer
        self._options = options

    @staticmethod
    def open(name: str, options: dict[str, Any]) -> "EncoderClassifier":
        """Load a model by name or folder, with a new head of two classes unless it has one.

        Raises:
            FlexOlmoError: transformers is missing, or it cannot load the model.
        """
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError:
            raise FlexOlmoError(f"the classifier {name!r} needs transformers; "
                                "install it with: pip install transformers") from None
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=2, problem_type="single_label_classification", ignore_mismatched_sizes=True,
                dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # transformers passes on whatever its many readers raise
            raise FlexOlmoError(f"cannot load the classifier {name!r}: expected 'linear', or the name or folder of a "
                                f"transformers encoder ({first_line(error)})") from error
        if tokenizer.pad_token is None:
            raise FlexOlmoError(f"the tokenizer of the classifier {name!r} has no padding token: expected an encoder's")
        positions = getattr(model.config, "max_position_embeddings", None) or options["max_tokens"]
        if options["max_tokens"] > positions:
            raise FlexOlmoError(f"--max-tokens {options['max_tokens']}: expected at most the {positions} that the "
                                f"classifier {name!r} can read")
        return EncoderClassifier(model, tokenizer, options)

    @staticmethod
    def train(name: str, texts: Sequence[str], labels: np.ndarray, *, seed: int, epochs: int, learning_rate: float,
              batch_size: int, max_tokens: int) -> "EncoderClassifier":
        """Fine-tune a model on documents, label 1 for the owner's, with a loss that weights both classes equally.

        Raises:
            FlexOlmoError: see ``open``; or the loss is not finite.
        """
        options = {"name": display_name(name), "epochs": epochs, "learning_rate": learning_rate,
                   "batch_size": batch_size, "max_tokens": max_tokens}
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # of the new head and of dropout
            result = EncoderClassifier.open(name, options)
            result._fit(texts, torch.from_numpy(labels), seed)
        return result

    def _fit(self, texts: Sequence[str], labels: torch.Tensor, seed: int) -> None:
        model, options = self._model, self._options
        size = options["batch_size"]
        steps = options["epochs"] * -(-len(texts) // size)
        warmup = max(1, round(WARMUP * steps))
        optimizer = torch.optim.AdamW(model.parameters(), lr=options["learning_rate"], weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)))
        class_weights = (len(labels) / (2 * torch.bincount(labels, minlength=2))).to(self._device)
        order = torch.Generator().manual_seed(seed)
        model.train()
        with DocumentProgress(options["epochs"] * len(texts)) as progress:
            for _ in range(options["epochs"]):
                for batch in torch.randperm(len(texts), generator=order).split(size):
                    chosen = [texts[index] for index in batch.tolist()]
                    logits = self._forward(chosen)
                    loss = torch.nn.functional.cross_entropy(logits, labels[batch].to(self._device), class_weights)
                    if not loss.isfinite():
                        raise FlexOlmoError(f"the loss of the classifier {options['name']} is {loss.item()}: expected "
                                            f"a finite number; --lr {options['learning_rate']:g} may be too high")
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
                    optimizer.step()
                    schedule.step()
                    progress.add(len(chosen), sum(len(text.encode()) for text in chosen))
        model.eval()

    def _forward(self, texts: list[str]) -> torch.Tensor:
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=self._options["max_tokens"],
                                 return_tensors="pt").to(self._device)
        return self._model(**inputs).logits

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `[n]`: how much larger the logit of the owner's class is."""
        result = np.empty(len(texts), np.float32)
        order = np.argsort([-len(text) for text in texts], kind="stable")  # little of a batch is padding then
        for start in range(0, len(order), self._options["batch_size"]):
            batch = order[start : start + self._options["batch_size"]]
            public, owner = self._forward([texts[index] for index in batch]).float().cpu().unbind(dim=1)
            result[batch] = (owner - public).numpy()
        return result

    def save(self, folder: Path) -> None:
        """Write weights, configuration and tokenizer."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        write_json(folder / _OPTIONS, self._options)

    @staticmethod
    def load(folder: Path) -> "EncoderClassifier":
        """Load what ``save`` wrote."""
        return EncoderClassifier.open(str(folder), read_json(folder / _OPTIONS, "options of a classifier"))

    def describe(self) -> dict[str, Any]:
        """What it is."""
        return dict(self._options)
