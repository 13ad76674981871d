"""``flexolmo data``: text to a tokenized Megatron data set."""

import argparse
import sys

from flexolmo_megatron.commands.documents import add_text_key_option, add_where_options


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "data", help="JSONL or Parquet text -> Megatron .bin/.idx",
        description="Tokenize the documents of JSONL and Parquet files into a Megatron data set: PREFIX.bin and "
                    "PREFIX.idx, and PREFIX.json with the counts. Existing files are never overwritten.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="file (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or quoted pattern, as in "
                             "'notes/**/*.jsonl'")
    parser.add_argument("--out", required=True, metavar="PREFIX", help="path of the output without its suffix")
    parser.add_argument("--tokenizer", default="byte", metavar="NAME",
                        help="byte (256 bytes and an end-of-document token), or the name or folder of a Hugging Face "
                             "tokenizer; must be the model's (default: %(default)s)")
    add_text_key_option(parser)
    add_where_options(parser)
    parser.add_argument("--max-bad", type=int, default=100, metavar="N",
                        help="how many empty or broken documents are skipped before the run stops "
                             "(default: %(default)s)")
    parser.add_argument("--valid-share", type=float, default=0.0, metavar="SHARE",
                        help="share of the documents, from 0 to 1, to set aside for validation: writes PREFIX_train "
                             "and PREFIX_valid instead of PREFIX (default: no split)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of the choice of validation documents (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run ``flexolmo data``."""
    from flexolmo_megatron.shards.run import Where
    from flexolmo_megatron.training.preprocess import preprocess
    from flexolmo_megatron.training.tokenizer import tokenizer_spec

    written, bad = preprocess(args.inputs, args.out, tokenizer=tokenizer_spec(args.tokenizer), text_key=args.text_key,
                              workers=args.workers, max_bad=args.max_bad, valid_share=args.valid_share, seed=args.seed,
                              shards=Where.of(args.workers, args.slurm) if args.slurm else None)
    for prefix, info in written.items():
        print(f"{prefix}: {info.documents:,} documents, {info.tokens:,} tokens, "
              f"{info.text_bytes / 1e6:,.1f} MB of text")
    if bad.counts:
        print(f"skipped {bad.report()}", file=sys.stderr)
