"""The configuration of a training run. Field names are Megatron's arguments where Megatron has one."""

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from omegaconf import MISSING

from flexolmo_megatron.config.model import MAX_ROUTER_WINDOW, ModelConfig
from flexolmo_megatron.config.precision import Fp8Config
from flexolmo_megatron.errors import FlexOlmoError


@dataclass
class DataConfig:
    """What is read."""

    train: list[str] = MISSING
    """Prefixes of .bin/.idx files from `flexolmo data`; for a blend, weights and prefixes in turn: [0.7, own, 0.3,
    public]."""
    valid: list[str] = field(default_factory=list)
    """The same for validation; empty for no validation."""
    public: list[str] = field(default_factory=list)
    """Public data to mix into an owner's run, given like train: it teaches the router row where the anchor is
    better."""
    public_share: float = 0.0
    """Share of the samples that come from `public`, from 0 to below 1. The paper's owners use none."""
    proxies: dict[str, list[Any]] = field(default_factory=dict)
    """Router tuning only: each owner's proxies by the name of the expert, given like train, for example
    data.proxies.math=[PREFIX]. `train` is the public data then. Samples come from it and from each owner's proxies in
    equal shares."""
    seq_length: int = 512
    """Tokens per sample."""
    cache: str | None = None
    """Folder for the sample indices; by default `cache` in the run's folder."""


@dataclass
class OptimizerConfig:
    """AdamW and its schedule; the defaults are the paper's for an owner's run (section 4.1)."""

    lr: float = 9e-4
    """Highest learning rate. For router tuning the default is 1e-4."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    router_lr: float | None = None
    """Highest learning rate of router rows and biases, with the same schedule; by default lr. 0 keeps them as they
    start."""
    lr_decay_style: str = "cosine"
    """cosine, linear, constant or WSD (warm-up, stable, decay)."""
    lr_warmup_iters: int = 0
    """Steps over which the learning rate rises from 0. For router tuning the default is the paper's, 100."""
    lr_wsd_decay_iters: int = 0
    """WSD only: steps of the final decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    use_distributed_optimizer: bool = False
    """Spread optimizer state over the data-parallel processes. May change from one launch of a run to the next."""


@dataclass
class ParallelConfig:
    """How many processes share what; the rest of the processes are data-parallel."""

    tensor: int = 1
    """Processes that share each layer's matrices."""
    pipeline: int = 1
    """Processes that share the layers."""
    virtual_pipeline: int = 1
    """Groups of layers per pipeline process: above 1, each has several places in the pipeline, which idles less. Needs
    a number of microbatches that pipeline divides."""
    context: int = 1
    """Processes that share each sequence, attention included."""
    expert: int = 1
    """Processes that share each layer's experts (moe only)."""
    expert_tensor: int | None = None
    """Processes that share each expert's matrices (moe with expert > 1 only); by default tensor."""
    sequence: bool = False
    """Split activations between matrices along the sequence (needs tensor > 1)."""
    moe_token_dispatcher_type: str = "alltoall"
    """How tokens reach their experts (moe only): alltoall or allgather."""


@dataclass
class ExpertConfig:
    """What an owner decides (expert runs only)."""

    name: str = ""
    """Name of the expert (needed): what users of the merged model switch on and off."""
    domain_vector: str | None = None
    """File from `flexolmo embed`: where the router row starts. Needed unless random_row."""
    random_row: bool = False
    """Ablation: start from a random row instead of a domain vector."""
    bias: bool = True
    """Train a bias per layer, used as min(bias, 0). False is the paper's ablation without it."""
    domain_loss_coeff: float = 0.0
    """Weight of a loss on the router alone: the mean squared distance of the owner's logit from domain_margin above the
    anchor's on the owner's documents, and as far below it on public ones. Needs data.public. The paper has none."""
    domain_margin: float = 4.0
    """Difference of the two logits that this loss asks for. All owners of a merged model should use the same."""
    routing_noise: float = 0.0
    """Standard deviation of noise on the owner's logit while training, drawn for each sequence and layer: the expert
    learns to work with any share of the routing weight, since other owners' experts will take some. The paper has
    none."""
    anchor_kl_coeff: float = 0.0
    """Weight of a loss that keeps the pair's next-token distribution near the anchor's on public documents: each token
    of data.public adds this times KL(p_anchor || p_pair), in nats, to its cross-entropy. Needs data.public, and one
    more forward pass of the anchor over public sequences. The paper has none."""
    drift_coeff: float = 0.0
    """Weight of a penalty on moving the mean hidden state of the owner's documents away from where the anchor has it:
    the squared distance, in standard deviations of public tokens, summed over coordinates and layers, times the owner's
    share of the tokens (metrics.jsonl: mean_drift, the mean over layers). It keeps the expert from raising the routing
    logits of owners whom it never meets, and holds it back: docs/routing.md has where it paid (0.01). Needs a domain
    vector from `flexolmo embed --public`. The paper has none."""
    ffn_hidden_size: int | None = None
    """Inner width of the expert; by default the anchor's. A narrower one starts from the first of the anchor's inner
    units."""
    router_window: int = 1
    """Positions over which routing logits are averaged: a token's own and those before it, since what a text is about
    shows in many tokens better than in one. All owners of a merged model must use the same. 1 is the paper's router."""
    coordination: bool = True
    """Ablation: False trains a dense copy of the anchor without coupling, whose FFNs are then packed as the expert."""


@dataclass
class TrainConfig:
    """A training run: `flexolmo train anchor|expert|dense|moe|router`."""

    out: str = MISSING
    """Folder of the run: checkpoints, metrics.jsonl, tensorboard, config.yaml. An existing run is resumed."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture of a new model; where a run starts from an anchor, the anchor's is used."""
    anchor: str | None = None
    """Checkpoint or Hugging Face directory to start from. Needed for an expert; optional for dense and moe."""
    merged: str | None = None
    """Merged model whose router is tuned (router only, needed); it is left as it is. The run ends with a tuned copy, in
    the folder `model` of `out`, which keeps the untuned rows, too."""
    leave_one_out: bool = False
    """Router only: after the rows for all experts tune one more set of rows for each owner, without that owner's expert
    and proxies: what the model uses where that owner is left out."""
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train_iters: int = 1000
    """Steps of the whole run."""
    micro_batch_size: int = 4
    """Sequences that one process computes at a time."""
    global_batch_size: int = 4
    """Sequences per step over all processes; above micro_batch_size times the data-parallel size, gradients
    accumulate."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 gradients and master weights; else in fp32. The same in all launches of a run."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    seed: int = 1234
    """Of initial weights and the order of samples."""
    moe_z_loss_coeff: float = 1e-3
    """Weight of the router z-loss (expert, moe and router). For router tuning the default is 0."""
    log_interval: int = 10
    """Steps between lines of progress; metrics.jsonl has every step."""
    eval_interval: int = 0
    """Steps between validations; 0 for one at the end."""
    eval_iters: int = 20
    """Global batches per validation."""
    save_interval: int = 0
    """Steps between checkpoints; 0 for one at the end."""
    keep: int = 2
    """Checkpoints to keep; older ones are deleted after a new one is complete."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy of each process's part in host memory, while training goes
    on."""
    checkpoint_hash: bool = True
    """Record the sha256 of every file of a checkpoint and compare it before the run goes on from there; false compares
    names and sizes of tensor files alone."""
    distributed_timeout_minutes: int = 60
    """How long a process waits for the others before it gives up: longer than rank 0 takes for what it does for all
    (digests, sample indices of the data), and than any process takes to write its part of a checkpoint."""
    max_skipped_steps: int = 3
    """Stop at this many steps in a row whose loss or gradients are not finite. Such a step changes no weight."""
    stop_after: int | None = None
    """Stop, with a checkpoint, after this many steps of this process (for time-limited jobs); the next start
    resumes."""

    def validate(self, data_parallel: int) -> None:
        """Check what no single field shows.

        Args:
            data_parallel: data-parallel size of the launch.

        Raises:
            FlexOlmoError: an impossible value; the message names the field, its value and what was expected.
        """
        self._validate_numbers()
        step = self.micro_batch_size * data_parallel
        if self.global_batch_size % step:
            raise FlexOlmoError(
                f"global_batch_size = {self.global_batch_size}: expected a multiple of micro_batch_size = "
                f"{self.micro_batch_size} times the {data_parallel} data-parallel processes"
            )
        self.fp8.validate(self.bf16)
        styles = ("cosine", "linear", "constant", "WSD")
        if self.optimizer.lr_decay_style not in styles:
            raise FlexOlmoError(
                f"optimizer.lr_decay_style = {self.optimizer.lr_decay_style!r}: expected one of {', '.join(styles)}"
            )
        if not 0 <= self.optimizer.lr_warmup_iters < self.train_iters:
            raise FlexOlmoError(
                f"optimizer.lr_warmup_iters = {self.optimizer.lr_warmup_iters}: expected 0 to train_iters - 1 = "
                f"{self.train_iters - 1}"
            )
        if self.optimizer.lr_decay_style == "WSD" and not 0 < self.optimizer.lr_wsd_decay_iters <= self.train_iters:
            raise FlexOlmoError(
                f"optimizer.lr_wsd_decay_iters = {self.optimizer.lr_wsd_decay_iters}: expected 1 to train_iters = "
                f"{self.train_iters}"
            )
        if not 0 <= self.data.public_share < 1 or bool(self.data.public) != (self.data.public_share > 0):
            raise FlexOlmoError(
                f"data.public_share = {self.data.public_share} with {len(self.data.public)} entries in "
                f"data.public: expected both or "
                "neither, and a share from 0 to below 1"
            )
        for name in ("domain_loss_coeff", "anchor_kl_coeff"):
            coefficient = getattr(self.expert, name)
            if not 0 <= coefficient < math.inf or (coefficient and not self.data.public):
                raise FlexOlmoError(
                    f"expert.{name} = {coefficient}: expected a number of 0 or more, and data.public where it is "
                    f"above 0"
                )
        if not 0 < self.expert.domain_margin < math.inf:
            raise FlexOlmoError(f"expert.domain_margin = {self.expert.domain_margin}: expected a number above 0")
        for name in ("routing_noise", "drift_coeff"):
            if not 0 <= (value := getattr(self.expert, name)) < math.inf:
                raise FlexOlmoError(f"expert.{name} = {value}: expected a number of 0 or more")
        if not 1 <= self.expert.router_window <= MAX_ROUTER_WINDOW:
            raise FlexOlmoError(
                f"expert.router_window = {self.expert.router_window}: expected 1 to {MAX_ROUTER_WINDOW}"
            )
        if self.expert.router_window > 1 and not self.expert.coordination:
            raise FlexOlmoError(
                f"expert.router_window = {self.expert.router_window}: without coordination no router is trained; "
                "expected 1, `flexolmo pack` takes it"
            )
        self._validate_pairs()

    def _validate_pairs(self) -> None:
        """Check what losses of a pair cannot be together with."""
        # KL: the schedule of a pipeline passes one microbatch on, not a second one of the anchor's; FP8 needs batches
        # whose size is known. Drift: a random row says nothing of the documents. Without coordination is no pair.
        excluded = {
            "anchor_kl_coeff": (("parallel.pipeline", 1), ("fp8.recipe", None), ("expert.coordination", True)),
            "drift_coeff": (("expert.random_row", False), ("expert.coordination", True)),
        }
        for loss, settings in excluded.items():
            coefficient = getattr(self.expert, loss)
            for name, usual in settings:
                if coefficient and (value := attrgetter(name)(self)) != usual:
                    raise FlexOlmoError(
                        f"expert.{loss} = {coefficient} with {name} = {value}: expected {name} = {usual}, or 0"
                    )

    def _validate_numbers(self) -> None:
        """Check the range of each number that stands for itself."""
        counts = ("train_iters", "micro_batch_size", "global_batch_size", "log_interval", "eval_iters", "keep",
                  "max_skipped_steps", "distributed_timeout_minutes", "data.seq_length", "stop_after")
        ranges = {
            "at least 1": (counts, lambda value: value >= 1),
            "0 or more": (("eval_interval", "save_interval"), lambda value: value >= 0),
            f"0 to {2**32 - 1}": (("seed",), lambda value: 0 <= value < 2**32),  # numpy's seeds, of Megatron's samples
            "a finite number above 0": (
                ("optimizer.lr", "optimizer.adam_eps"),
                lambda value: 0 < value < math.inf,
            ),
            "a finite number, 0 or more": (
                ("optimizer.router_lr", "optimizer.weight_decay", "optimizer.clip_grad", "moe_z_loss_coeff"),
                lambda value: 0 <= value < math.inf,
            ),
            "0 to below 1": (("optimizer.adam_beta1", "optimizer.adam_beta2"), lambda value: 0 <= value < 1),
            f"0 to optimizer.lr = {self.optimizer.lr}": (
                ("optimizer.min_lr",),
                lambda value: 0 <= value <= self.optimizer.lr,
            ),
        }
        for expected, (names, holds) in ranges.items():
            for name in names:
                value = attrgetter(name)(self)
                if value is not None and not holds(value):
                    raise FlexOlmoError(f"{name} = {value}: expected {expected}")


@dataclass
class RouterTrainConfig(TrainConfig):
    """A run of `flexolmo train router`: other defaults."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, lr_warmup_iters=100))
    """A 20th of the paper's learning rate (section 4.1), at which rows forget what proxies do not show
    (docs/routing.md)."""
    moe_z_loss_coeff: float = 0.0
    """A z-loss is on the level of the logits, which the softmax ignores and frozen layers set: in a model of 10 M
    parameters it was half as large as the loss, and spoiled the rows (docs/routing.md)."""
