"""``flexolmo bench``: ours against stock, side by side in one run."""

import argparse
import json


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("bench", help="measure against stock Megatron, transformers and a plain copy")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    _register_pair_step(benches)
    _register_merge(benches)
    _register_gpu(benches)


def _register_pair_step(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "pair-step",
        help="one training step of an owner's run: ours, stock Megatron, transformers",
        description="Take training steps of an owner's run in turn: the coupled pair with a frozen anchor (ours), "
        "Megatron's MoELayer with the anchor's gradients set to zero (stock), and transformers' FlexOlmo. Same "
        "weights, same tokens, one process.",
    )
    for name, default, text in (
        ("hidden", 512, "hidden size"),
        ("ffn", 1376, "inner width of each expert"),
        ("layers", 8, "decoder layers"),
        ("heads", 8, "attention heads"),
        ("vocab", 4096, "vocabulary size"),
        ("sequences", 2, "sequences in a step"),
        ("length", 512, "tokens in a sequence"),
        ("rounds", 10, "timed steps of each"),
        ("seed", 1234, "of weights and tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.set_defaults(run=run_pair_step)


def _register_merge(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "merge",
        help="merging against a plain copy of the same bytes",
        description="Make anchors and packages of random numbers, then merge them and copy the same bytes in turn; "
        "speeds with fsync, and the merging process's peak memory for two sizes of model and two numbers of experts.",
    )
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="existing folder on the disk to measure (default: the system's temporary folder)",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="copies and merges of each size (default: %(default)s)"
    )
    parser.add_argument(
        "--format", choices=("megatron", "hf"), default="megatron", help="of the merged model (default: %(default)s)"
    )
    parser.set_defaults(run=run_merge)


def _register_gpu(benches: argparse._SubParsersAction) -> None:
    parser = benches.add_parser(
        "gpu",
        help="Transformer Engine against the local modules, and speeds at 7B widths, on one GPU",
        description="On one NVIDIA GPU with Transformer Engine: compare its modules with the local ones on the same "
        "weights (bf16 and FP8; forward, backward, excluded experts); then measure the step of an owner's run with as "
        "many layers as fit, the merged layer (8 experts, top-4) and the grouped matrix product at 7B widths (hidden "
        "4096, FFN 11008), next to stock Megatron and to the card's own matrix products. Takes some minutes. Exit "
        "status 1 if a comparison is out of its tolerance.",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: run the same steps at tiny sizes without Transformer Engine, to test this command on a machine "
        "without a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="FP8 recipe: delayed, tensorwise, blockwise or mxfp8 (default: mxfp8 where the chip has it, else "
        "tensorwise, else no FP8)",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the pair (default: as many as fit)")
    for name, default, text in (("rounds", 10, "timed steps of each"), ("seed", 1234, "of weights and tokens")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run_gpu)


def run_pair_step(args: argparse.Namespace) -> None:
    """Run ``flexolmo bench pair-step``."""
    from rich.console import Console

    from flexolmo_megatron.config.model import ModelConfig
    from flexolmo_megatron.runtime.setup import prepare

    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=args.ffn,
        num_attention_heads=args.heads,
        num_query_groups=args.heads,
        vocab_size=args.vocab,
        max_position_embeddings=args.length,
        num_experts=2,
        top_k=2,
    )
    prepare()
    from flexolmo_megatron.training.bench import bench_pair_step, table

    contestants = bench_pair_step(model, args.sequences, args.length, args.rounds, args.seed)
    Console(width=165).print(table(contestants, args.sequences * args.length))


def run_merge(args: argparse.Namespace) -> None:
    """Run ``flexolmo bench merge``."""
    from rich.console import Console

    from flexolmo_megatron.exchange.bench import bench_merge, render

    Console(width=140).print(render(bench_merge(args.scratch, rounds=args.rounds, format=args.format)))


def run_gpu(args: argparse.Namespace) -> None:
    """Run ``flexolmo bench gpu``."""
    from rich.console import Console

    from flexolmo_megatron.errors import FlexOlmoError
    from flexolmo_megatron.runtime.setup import prepare

    for name in ("layers", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise FlexOlmoError(f"--{name} {value}: expected 1 or more")
    prepare()
    from flexolmo_megatron.training.bench_gpu import bench_gpu, choose
    from flexolmo_megatron.training.bench_report import render

    chip, recipe = choose(args.device, args.recipe)
    result = bench_gpu(chip, recipe, layers=args.layers, rounds=args.rounds, seed=args.seed)
    if args.json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        Console(width=120).print(render(result))
    if not result.passed:
        raise SystemExit(1)
