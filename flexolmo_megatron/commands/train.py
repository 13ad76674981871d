"""``flexolmo train``: anchor, expert, dense, moe and router runs, in one process or under torchrun."""

import argparse
import atexit
from pathlib import Path

from flexolmo_megatron.config.load import load_config, preset_names
from flexolmo_megatron.errors import StopRequested

MODES = {
    "anchor": "a new public anchor: a dense model from random weights",
    "expert": "an owner's expert beside the frozen anchor; needs anchor=, expert.name= and expert.domain_vector=",
    "dense": "a dense model, from anchor= or random weights (baselines)",
    "moe": "an unrestricted mixture, all weights jointly, from anchor= or random weights (baselines)",
    "router": "the router rows and biases of a merged model, all else frozen; needs merged=, public data as "
    "data.train= and data.proxies.NAME= of owners (by default optimizer.lr=1e-4 "
    "optimizer.lr_warmup_iters=100 moe_z_loss_coeff=0; the paper's are optimizer.lr=2e-3 moe_z_loss_coeff=1e-3)",
}


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "train",
        help="train an anchor, an owner's expert, a merged model's router or a baseline",
        description="Train, or resume, one run. On several devices: "
        "torchrun --nproc-per-node N -m flexolmo_megatron.train MODE …",
        epilog="SIGTERM and SIGUSR1 end a run after its step, with a checkpoint and exit status 75; under torchrun, "
        "which ends with 1 then,\nthe file OUT/requeue says so. The same command goes on with the run. torchrun kills "
        "what has not ended after 30\nseconds: where a step and a checkpoint take longer, raise its "
        "--shutdown-timeout.\n\n"
        "options of a run (KEY=VALUE, or in a YAML file):\n\n" + describe_options(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``flexolmo train`` and ``python -m flexolmo_megatron.train`` share."""
    parser.add_argument("mode", choices=MODES, help="; ".join(f"{name}: {text}" for name, text in MODES.items()))
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of options; may be repeated, later ones win",
    )
    parser.add_argument("--preset", choices=preset_names(), help="named sizes and settings to start from")
    parser.add_argument(
        "--leave-one-out",
        action="store_true",
        help="router only, short for leave_one_out=true: tune another set of rows for each owner, without that owner",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="single options, for example optimizer.lr=1e-3 model.num_layers=16",
    )


def describe_options() -> str:
    """All options of a run with their defaults and docstrings, as text."""
    from flexolmo_megatron.config.describe import describe
    from flexolmo_megatron.config.train import TrainConfig

    return describe(TrainConfig)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from flexolmo_megatron.config.train import RouterTrainConfig, TrainConfig
    from flexolmo_megatron.training.signals import forget_stop, stay_stopped

    schema = RouterTrainConfig if args.mode == "router" else TrainConfig
    overrides = [*args.overrides, *(["leave_one_out=true"] if args.leave_one_out else [])]
    config = load_config(schema, preset=args.preset, paths=args.config, overrides=overrides)
    stay_stopped(Path(config.out))
    forget_stop(Path(config.out))

    from flexolmo_megatron.runtime.setup import prepare

    prepare()
    from flexolmo_megatron.training.run import train

    try:
        train(args.mode, config)
    except StopRequested:
        atexit.register(_leave)
        raise
    atexit.register(_leave)  # not after an error: the other processes may not come along


def _leave() -> None:
    """Part from the other processes in order, as NCCL wants it, when the interpreter ends."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
