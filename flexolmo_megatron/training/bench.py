"""``flexolmo bench pair-step``: one training step of an owner's run, three ways, side by side in one process.

(a) ours: the coupled pair with a frozen anchor.
(b) stock: Megatron's own MoELayer, router, core attention and optimizer settings in the same layers, with the research
    code's method: gradients for both experts, the anchor's set to zero after the backward pass, Adam over both.
    A second line, "stock MoE", has our core attention and torch's fused AdamW, so that only the pair layer differs.
(c) transformers: its FlexOlmo with everything but the experts and routers frozen. From transformers 5 on its experts
    are one stacked parameter, so that the anchor's gradient is set to zero after the backward pass, as in (b).

All start from the same weights, see the same tokens and take their steps in turn, so that a change of the machine's
speed meets all alike. Attention, norms and the head are frozen in all three.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import psutil
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from rich.table import Table
from torch import Tensor, nn
from tqdm import trange

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import save_model
from flexolmo_megatron.inference.pair import couple
from flexolmo_megatron.model.builder import build_model
from flexolmo_megatron.model.config import transformer_config
from flexolmo_megatron.model.spec import TorchSpecProvider
from flexolmo_megatron.model.weights import load_weights
from flexolmo_megatron.runtime.setup import initialize, local_device
from flexolmo_megatron.training.bench_steps import (
    Z_LOSS,
    halves,
    megatron_step,
    random_batch,
    stock_spec,
    synchronize,
    train_ffns_but_mask_anchor,
)
from flexolmo_megatron.training.freezing import freeze_anchor
from flexolmo_megatron.training.memory import memory_report
from flexolmo_megatron.training.optimization import build_optimizer


@dataclass
class Contestant:
    """One way of taking the step."""

    name: str
    step: Callable[[], float]
    """Take one step; returns the loss before it."""
    state_bytes: Callable[[], tuple[int, int, int]]
    """Bytes of weights, gradients and optimizer state after the first step."""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Highest memory during a step above that before it."""
    first_loss: float = 0.0


class _StockAttention(TorchSpecProvider):
    """Megatron's own core attention where Transformer Engine is missing; its norm refuses what ours allows."""

    def core_attention(self) -> type:
        return DotProductAttention


class _PeakMemory:
    """Highest memory of the process within a block, above that at its start. On the CPU, resident memory, sampled."""

    def __enter__(self) -> "_PeakMemory":
        self.bytes = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._process = psutil.Process()
            self._start = self._process.memory_info().rss
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._start)

    def __exit__(self, *error: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        else:
            self._done.set()
            self._thread.join()


def _megatron(
    name: str,
    model: GPTModel,
    config: TrainConfig,
    batch: dict[str, Tensor],
    mask: Callable[[], None],
    fused_adamw: bool = True,
) -> Contestant:
    """A contestant on Megatron's DDP and optimizer; ``mask`` runs between the backward pass and the optimizer."""
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    optimizer = build_optimizer(config, [wrapped])
    if not fused_adamw:
        for group in optimizer.param_groups:
            group["fused"] = None  # as torch, and so Megatron, has it by default

    def state_bytes() -> tuple[int, int, int]:
        report = memory_report([wrapped], optimizer)
        return report.weight_bytes, report.gradient_bytes, report.optimizer_bytes

    return Contestant(name, partial(megatron_step, wrapped, optimizer, batch, mask), state_bytes)


def _pair_and_weights(model: ModelConfig) -> tuple[GPTModel, LazyModel]:
    """A random pair, and a view of it as the two-expert model that it is."""
    pair = build_model(model, "pair", transformer_config(model, "pair", moe_z_loss_coeff=Z_LOSS)).to(local_device())
    with torch.no_grad():
        for name, parameter in pair.named_parameters():
            if "router" in name:
                parameter.normal_(std=model.init_method_std)
    return pair, couple(*halves(pair, model))


def _stock(
    name: str,
    model: ModelConfig,
    weights: LazyModel,
    config: TrainConfig,
    batch: dict[str, Tensor],
    *,
    ours_around: bool,
) -> Contestant:
    """Megatron's mixture; ``ours_around`` says whether attention and optimizer are as in our run."""
    megatron_config = transformer_config(model, "moe", moe_z_loss_coeff=Z_LOSS)
    backend = None if ours_around or HAVE_TE else _StockAttention()
    mixture = build_model(model, "moe", megatron_config, spec=stock_spec(megatron_config, backend)).to(local_device())
    load_weights(mixture, weights)
    mask = train_ffns_but_mask_anchor(mixture)
    return _megatron(name, mixture, config, batch, mask, fused_adamw=ours_around)


def _transformers(weights: LazyModel, config: TrainConfig, batch: dict[str, Tensor]) -> Contestant:
    from transformers import FlexOlmoForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(weights, f"{folder}/hf", "hf")
        model = FlexOlmoForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32).to(local_device())
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stacked = [parameter for parameter in trained if len(parameter) == 2]  # experts and rows; [0] is the anchor's
    separate = [
        p for name, p in model.named_parameters() if ".mlp.experts.0." in name
    ]  # transformers 4: frozen for real
    for parameter in separate:
        parameter.requires_grad_(False)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [parameter for parameter in trained if parameter.requires_grad],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )

    def step() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=batch["tokens"], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        for parameter in stacked:
            parameter.grad[0].zero_()
        nn.utils.clip_grad_norm_(trained, settings.clip_grad)
        optimizer.step()
        return loss.item()

    def state_bytes() -> tuple[int, int, int]:
        state = [value for values in optimizer.state.values() for value in values.values()]
        return tuple(
            sum(t.numel() * t.element_size() for t in tensors)
            for tensors in (list(model.parameters()), [p.grad for p in trained if p.grad is not None], state)
        )

    return Contestant("transformers", step, state_bytes)


def bench_pair_step(model: ModelConfig, sequences: int, length: int, rounds: int, seed: int) -> list[Contestant]:
    """Take ``rounds`` timed steps of each contestant in turn, after one that is not timed.

    Args:
        model: architecture of the pair (num_experts = top_k = 2).
        sequences: in a step.
        length: tokens in a sequence.
        rounds: timed steps.
        seed: of weights and tokens.
    """
    initialize()
    torch.manual_seed(seed)
    batch = random_batch(model, sequences, length)
    config = TrainConfig(out="")
    pair, weights = _pair_and_weights(model)
    contestants = [
        _stock("stock", model, weights, config, batch, ours_around=False),
        _stock("stock MoE", model, weights, config, batch, ours_around=True),
    ]
    if find_spec("transformers"):
        contestants.append(_transformers(weights, config, batch))
    freeze_anchor(pair)
    contestants.insert(0, _megatron("ours", pair, config, batch, lambda: None))
    for contestant in contestants:
        contestant.first_loss = contestant.step()
    for _ in trange(rounds, unit="round", disable=None):
        for contestant in contestants:
            with _PeakMemory() as peak:
                synchronize()
                began = time.perf_counter()
                contestant.step()
                synchronize()
                contestant.seconds.append(time.perf_counter() - began)
            contestant.peak_bytes = max(contestant.peak_bytes, peak.bytes)
    return contestants


def table(contestants: list[Contestant], tokens: int) -> Table:
    """The result: speeds as medians, and how the others compare with ours."""
    columns = (
        "",
        "first loss",
        "s / step",
        "tokens/s",
        "our speed-up",
        "weights",
        "gradients",
        "optimizer",
        "gradients + optimizer",
        "peak in a step",
    )
    result = Table(*columns, title="one step of an owner's run, in turn, in one process; sizes in MB")
    ours = statistics.median(contestants[0].seconds)
    for contestant in contestants:
        seconds = statistics.median(contestant.seconds)
        weights, gradients, optimizer = contestant.state_bytes()
        total, our_total = gradients + optimizer, sum(contestants[0].state_bytes()[1:])
        result.add_row(
            contestant.name,
            f"{contestant.first_loss:.5f}",
            f"{seconds:.3f}",
            f"{tokens / seconds:,.0f}",
            f"{seconds / ours:.2f}x",
            *(f"{value / 1e6:,.1f}" for value in (weights, gradients, optimizer)),
            f"{total / 1e6:,.1f} (ours: {our_total / total:.2f}x)",
            f"{contestant.peak_bytes / 1e6:,.0f}",
        )
    return result
