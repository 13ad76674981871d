"""``flexolmo import`` and ``flexolmo export``: Hugging Face directory to Megatron checkpoint and back."""

import argparse

from flexolmo_megatron.commands.models import add_rows_option


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verbs to the command line."""
    parser = subparsers.add_parser(
        "import", help="Hugging Face directory -> Megatron checkpoint",
        description="Read an Olmo2 or FlexOlmo model that transformers saved (safetensors, sharded or not) and write a "
                    "Megatron checkpoint with bitwise the same tensors.")
    parser.add_argument("source", metavar="HF_DIR", help="directory with config.json and model*.safetensors")
    parser.add_argument("out", metavar="OUT", help="new directory for the Megatron checkpoint")
    parser.set_defaults(run=run_import)

    parser = subparsers.add_parser(
        "export", help="Megatron checkpoint -> Hugging Face directory, optionally only some experts",
        description="Write a directory that transformers loads as Olmo2ForCausalLM or FlexOlmoForCausalLM. With only "
                    "some experts it is a smaller FlexOlmo model, without any tensor of the others.")
    parser.add_argument("source", metavar="CKPT",
                        help="Megatron checkpoint, training run (its newest checkpoint is taken) or Hugging "
                             "Face directory")
    parser.add_argument("out", metavar="HF_DIR", help="new directory")
    experts = parser.add_mutually_exclusive_group()
    experts.add_argument("--experts", type=_names, metavar="A,B",
                         help="names of the experts to keep; the public one always is (default: all)")
    experts.add_argument("--exclude", type=_names, metavar="C,D",
                         help="names of the experts to leave out (default: none)")
    add_rows_option(parser)
    parser.add_argument("--drop-bias", action="store_true",
                        help="leave out a learned router bias, for which the format has no place; without this option "
                             "a model with one is refused, with what dropping it would change")
    parser.add_argument("--max-shard-size", type=_bytes, default=5_000_000_000, metavar="SIZE",
                        help="largest weight file: bytes, or a number with KB, MB or GB, powers of 1000 (default: 5GB)")
    parser.set_defaults(run=run_export)


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _bytes(text: str) -> int:
    number, factor = text.strip().upper(), 1
    for suffix, value in (("KB", 1000), ("MB", 1000**2), ("GB", 1000**3)):
        if number.endswith(suffix):
            number, factor = number.removesuffix(suffix), value
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB, 500MB or a number of bytes")
    return size


def run_import(args: argparse.Namespace) -> None:
    """Run ``flexolmo import``."""
    from flexolmo_megatron.convert.huggingface import open_huggingface
    from flexolmo_megatron.convert.model import save_model, total_bytes, watch
    from flexolmo_megatron.convert.progress import byte_progress

    model = open_huggingface(args.source)
    with byte_progress(total_bytes(model), "import") as add:
        save_model(watch(model, add), args.out, "megatron")
    print(f"{args.out}: {_describe(model)}")


def run_export(args: argparse.Namespace) -> None:
    """Run ``flexolmo export``."""
    import sys

    from flexolmo_megatron.convert.huggingface import describe_bias
    from flexolmo_megatron.convert.model import (
        exclude_experts,
        open_model,
        save_model,
        select_experts,
        total_bytes,
        watch,
    )
    from flexolmo_megatron.convert.progress import byte_progress

    model = open_model(args.source)
    if args.experts is not None:
        model = select_experts(model, args.experts, args.rows)
    elif args.exclude is not None or args.rows != "strict":
        model = exclude_experts(model, args.exclude or [], args.rows)
    with byte_progress(total_bytes(model), "export") as add:
        save_model(watch(model, add), args.out, "hf", args.drop_bias, args.max_shard_size)
    if model.card.model.router_bias:
        print(f"learned router bias left out: {describe_bias(model)}", file=sys.stderr)
    print(f"{args.out}: {_describe(model)}")


def _describe(model) -> str:
    """One line on what was written."""
    from flexolmo_megatron.convert.model import total_bytes

    experts = model.card.expert_names
    kind = f"{len(experts)} expert{'s' if len(experts) > 1 else ''} ({', '.join(experts)})" if experts else "dense"
    return f"{model.card.model.num_layers} layers, {kind}, {total_bytes(model) / 1e9:,.3f} GB of tensors"
