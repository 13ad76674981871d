"""``flexolmo plan``: memory, parallel layout and time of a run on N GPUs, before a node is booked."""

import argparse
import math
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexolmo_megatron.config.train import TrainConfig
    from flexolmo_megatron.launch.plan_hardware import Hardware
    from flexolmo_megatron.launch.plan_work import Mode, Work

_GPU_OPTIONS = (
    ("peak_tflops", "TFLOP/s", "dense bfloat16 peak of a GPU"),
    ("memory_bandwidth", "GB/s", "memory bandwidth of a GPU"),
    ("intra_bandwidth", "GB/s", "from a GPU to those of its node, one direction"),
    ("inter_bandwidth", "GB/s", "from a GPU to other nodes, one direction"),
)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb."""
    from flexolmo_megatron.config.load import preset_names
    from flexolmo_megatron.launch.plan_hardware import GPUS
    from flexolmo_megatron.launch.plan_work import MODES

    parser = subparsers.add_parser(
        "plan",
        help="parallel layouts of a run on N GPUs: memory, traffic, estimated time",
        description="List the layouts of a run that fit on N GPUs, fastest first. What files and overrides set of "
        "parallel, micro_batch_size and optimizer.use_distributed_optimizer is kept. Memory is counted tensor by "
        "tensor; times are estimates from a data sheet and an assumed share of peak, not measurements. No GPU needed.",
    )
    parser.add_argument("--preset", choices=preset_names(), help="named sizes and settings to start from")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file of a run's options; "
                        "may be repeated, later ones win")  # fmt: skip
    parser.add_argument(
        "--mode", choices=MODES, help="what runs, as in `flexolmo train`; router: only router rows train; inference: "
        "serving (default: moe where the model has several experts, else expert)",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="sets what the options below do not "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of a GPU, in 1e9 bytes")
    for name, unit, text in _GPU_OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar=unit, help=text)
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.4, metavar="X", help="share of the peak that kernels are "
                        "assumed to reach while no one communicates, 0 to 1 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--reserve", type=float, default=8.0, metavar="GB", help="memory kept free for CUDA, NCCL, "
                        "fragmentation and uneven routing (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tokens", type=float, metavar="B", help="tokens of the run, in units of 1e9 (default: "
                        "train_iters x global_batch_size x data.seq_length; for router tuning without a given "
                        "train_iters 5, as in the paper)")  # fmt: skip
    parser.add_argument("--backend", choices=("te", "local"), default="te", help="whose activations are counted: "
                        "Transformer Engine's modules or the local ones (default: %(default)s)")  # fmt: skip
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE", help="draw the layouts as a PNG picture")
    parser.add_argument("--explain", action="store_true", help="add every formula with its inputs")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="single options of the run, for example "
                        "global_batch_size=512 model.top_k=2")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from flexolmo_megatron.config.load import load_config
    from flexolmo_megatron.config.train import TrainConfig
    from flexolmo_megatron.errors import FlexOlmoError
    from flexolmo_megatron.launch.plan_hardware import GB, GPUS
    from flexolmo_megatron.launch.plan_work import work_of

    # A plan needs neither data nor a folder.
    overrides = ["out=none", "data.train=[]", *args.overrides]
    config = load_config(TrainConfig, preset=args.preset, paths=args.config, overrides=overrides)
    if config.fp8.recipe is not None:
        raise FlexOlmoError(f"fp8.recipe = {config.fp8.recipe}: the plan counts bf16 and fp32 only; leave it out")
    memory = GPUS[args.gpu]["memory"] if args.gpu_memory is None else args.gpu_memory
    if not 0 < memory < math.inf:
        raise FlexOlmoError(f"--gpu-memory {memory:g}: expected a finite number of GB above 0")
    if not 0 <= args.reserve < memory:
        raise FlexOlmoError(f"--reserve {args.reserve:g} GB: expected 0 to below the GPU's {memory:g} GB")
    for name in ("gpus", "gpus_per_node", "top"):
        if getattr(args, name) < 1:
            raise FlexOlmoError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    mode = args.mode or ("moe" if config.model.num_experts > 1 else "expert")
    work = work_of(config, mode, args.backend)
    if not config.bf16 and args.peak_tflops is None:
        raise FlexOlmoError("bf16 = false: the GPU's peak is bfloat16's, and fp32 is slower; set bf16=true, or give "
                            "--peak-tflops of the fp32 or TF32 products that the run is to use")
    given = _given(args)
    limit = (memory - args.reserve) * GB
    if mode == "inference":
        _run_inference(args, work, _hardware(args), limit)
    else:
        _run_training(args, config, given, work, _hardware(args), limit)


def _hardware(args: argparse.Namespace) -> "Hardware":
    from flexolmo_megatron.errors import FlexOlmoError
    from flexolmo_megatron.launch.plan_hardware import GPUS, Hardware

    given = {name: getattr(args, name) for name, _, _ in _GPU_OPTIONS}
    values = {name: GPUS[args.gpu][name] if value is None else value for name, value in given.items()}
    for name, value in values.items():
        if not value > 0:
            raise FlexOlmoError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0")
    if not 0 < args.share <= 1:
        raise FlexOlmoError(f"--share {args.share:g}: expected a number above 0 and at most 1")
    return Hardware(**values, gpus_per_node=args.gpus_per_node, share=args.share)


def _given(args: argparse.Namespace) -> set[str]:
    """Dotted names of the options that files and overrides set, unlike those of a preset, which are a start."""
    from omegaconf import DictConfig, OmegaConf

    from flexolmo_megatron.config.load import parse_override
    from flexolmo_megatron.config.train import TrainConfig

    sources = [*(OmegaConf.load(path) for path in args.config),
               *(parse_override(TrainConfig, override) for override in args.overrides)]  # fmt: skip
    names = set()
    for source in sources:
        for name in source:
            section = None if OmegaConf.is_missing(source, name) else source[name]
            names |= {f"{name}.{key}" for key in section} if isinstance(section, DictConfig) else {str(name)}
    return names


def _pinned(config: "TrainConfig", given: set[str], work: "Work") -> dict[str, int]:
    """The part of the layout that is given, by the names of ``Layout``'s fields.

    Raises:
        FlexOlmoError: it is one that the plan does not count.
    """
    from flexolmo_megatron.errors import FlexOlmoError

    fields = {"parallel.tensor": "tensor", "parallel.pipeline": "pipeline", "parallel.virtual_pipeline": "virtual",
              "parallel.context": "context", "parallel.expert": "expert", "parallel.expert_tensor": "expert_tensor",
              "micro_batch_size": "micro_batch"}  # fmt: skip
    pinned = {}
    for name, field in fields.items():
        value = attrgetter(name)(config)
        if name not in given or value is None:
            continue
        if value < 1:
            raise FlexOlmoError(f"{name} = {value}: expected at least 1")
        pinned[field] = value
    if "parallel.sequence" in given and not config.parallel.sequence and pinned.setdefault("tensor", 1) > 1:
        raise FlexOlmoError(f"parallel.sequence = false with parallel.tensor = {pinned['tensor']}: the plan counts "
                            "tensor parallelism with parallel.sequence=true alone")
    if pinned.get("context", 1) > 1 and work.backend == "local":
        raise FlexOlmoError(f"parallel.context = {pinned['context']} with --backend local: the plan leaves out context "
                            "parallelism of the local modules")
    if config.parallel.moe_token_dispatcher_type != "alltoall" and work.kind == "moe":
        raise FlexOlmoError(f"parallel.moe_token_dispatcher_type = {config.parallel.moe_token_dispatcher_type!r}: the "
                            "plan counts alltoall alone")
    if "optimizer.use_distributed_optimizer" in given:
        pinned["distributed"] = config.optimizer.use_distributed_optimizer
    return pinned


def _tokens(args: argparse.Namespace, config: "TrainConfig", mode: "Mode", given: set[str]) -> float:
    from flexolmo_megatron.errors import FlexOlmoError

    if args.tokens is None and mode == "router" and "train_iters" not in given:
        return 5e9  # section 4.1 of the paper
    if args.tokens is None:
        return float(config.train_iters * config.global_batch_size * config.data.seq_length)
    if not args.tokens > 0:
        raise FlexOlmoError(f"--tokens {args.tokens:g}: expected a number of 1e9 tokens above 0")
    return args.tokens * 1e9


def _print_json(args: argparse.Namespace, hardware: "Hardware", limit: float, **more: object) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps({"gpus": args.gpus, "memory_limit_bytes": limit, "hardware": asdict(hardware), **more}, indent=2))


def _run_training(
    args: argparse.Namespace, config: "TrainConfig", given: set[str], work: "Work", hardware: "Hardware", limit: float
) -> None:
    from rich.console import Console

    from flexolmo_megatron.launch.plan import overrides, plan
    from flexolmo_megatron.launch.plan_explain import explain
    from flexolmo_megatron.launch.plan_hardware import GB
    from flexolmo_megatron.launch.plan_report import as_record, draw, layout_table, traffic_table

    tokens = _tokens(args, config, work.mode, given)
    pinned = _pinned(config, given, work)
    found = plan(work, hardware, args.gpus, limit, pinned)
    shown = found[: args.top]
    title = f"{work.mode} run, {args.gpus} GPUs with {limit / GB:g} GB free, {work.tokens:,} tokens per step"
    if args.plot:
        draw(shown, hardware, limit, title, args.plot)
    if args.json:
        _print_json(args, hardware, limit, mode=work.mode, tokens=tokens, fitting=len(found),
                    layouts=[as_record(estimate, tokens) for estimate in shown])  # fmt: skip
        return
    console = Console(width=120, highlight=False)
    console.print(layout_table(shown, tokens, title))
    source = " (activations of Transformer Engine from its source, not measured)" if work.backend == "te" else ""
    console.print(
        f"{len(shown)} of {len(found)} combinations of TP, PP, EP, ETP and CP that fit, each with its fastest micro "
        f"batch and VPP. Memory is counted{source}; sent bytes are per GPU and step; bubble, "
        f"step, MFU and days (for {tokens / 1e9:.4g} B tokens) are estimates at {100 * hardware.share:g} % of "
        f"{hardware.peak_tflops:g} TFLOP/s, not measurements. Sequence parallel is on where TP > 1, the distributed "
        f"optimizer where DP > 1."
    )
    if pinned:
        fixed = ", ".join(f"{name} = {value}" for name, value in pinned.items())
        console.print(f"Given, not chosen: {fixed}. Leave such options out to compare other layouts.")
    console.print(traffic_table(shown[0]))
    console.print(f"options of layout 1: {' '.join(overrides(shown[0].layout))}", soft_wrap=True)
    if args.explain:
        console.print(explain(work, shown[0], hardware, limit, tokens), markup=False, soft_wrap=True)


def _run_inference(args: argparse.Namespace, work: "Work", hardware: "Hardware", limit: float) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from flexolmo_megatron.errors import FlexOlmoError
    from flexolmo_megatron.launch.plan_hardware import GB
    from flexolmo_megatron.launch.plan_inference import plan_inference
    from flexolmo_megatron.launch.plan_serving_report import EXPLANATION, serving_table

    if args.plot:
        raise FlexOlmoError("--plot: there is no picture for --mode inference; leave it out")
    found = plan_inference(work, hardware, args.gpus, limit)[: args.top]
    if args.json:
        _print_json(args, hardware, limit, mode=work.mode, layouts=[asdict(serving) for serving in found])
        return
    console = Console(width=120, highlight=False)
    title = f"inference, {args.gpus} GPUs with {limit / GB:g} GB free, sequences of {work.sequence:,} tokens"
    console.print(serving_table(found, title))
    console.print(
        "Memory is counted, speeds are estimates, not measurements. `flexolmo generate` is TP 1, EP 1; other layouts "
        "are for a serving engine with the exported model."
    )
    if args.explain:
        console.print(EXPLANATION, markup=False, soft_wrap=True)
