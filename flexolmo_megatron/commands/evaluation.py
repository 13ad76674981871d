"""``flexolmo eval``: bits per byte of models on domains. ``flexolmo plot``: curves of training runs."""

import argparse

from flexolmo_megatron.commands.documents import add_text_key_option
from flexolmo_megatron.commands.models import add_candidates_option, add_loading_options

_EVAL_EXAMPLE = """\
example:
  flexolmo eval --out results --reference public --routing \\
    --model public=runs/anchor --model merged=runs/merged \\
    --model 'without math=runs/merged@-math' --model 'code alone=runs/merged@public,code' \\
    --domain math=data/math.jsonl --domain 'code=data/code/*.jsonl.gz'
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add both verbs to the command line."""
    parser = subparsers.add_parser(
        "eval", help="bits per byte of models on domains, with pictures",
        description="Measure how many bits each model needs per UTF-8 byte of each domain (lower is better).\n"
                    "Prints a table and writes results.json, results.csv, results.md, bits_per_byte.png and,\n"
                    "with --routing, routing_share.png.",
        epilog=_EVAL_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_candidates_option(parser)
    parser.add_argument("--domain", action="append", required=True, metavar="NAME=FILES",
                        help="a domain and its documents (repeatable): a file (.jsonl, .jsonl.gz, .jsonl.zst, "
                             ".parquet) or a quoted pattern. A name that comes again adds files")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the results")
    parser.add_argument("--max-bytes", type=int, metavar="N",
                        help="evaluate only the first N bytes of text of each domain (default: all)")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N",
                        help="tokens, with padding, that a model computes at a time, but at least one sequence; more "
                             "is faster and takes more memory, the results differ by rounding only (default: "
                             "%(default)s)")
    add_text_key_option(parser)
    parser.add_argument("--max-bad", type=int, default=100, metavar="N",
                        help="how many empty or broken documents per domain are skipped before the run stops "
                             "(default: %(default)s)")
    parser.add_argument("--routing", action="store_true",
                        help="also record and draw the share of each expert, by layer and domain")
    add_loading_options(parser)
    parser.add_argument("--reference", metavar="NAME",
                        help="one of the models: show the others' change from it, in percent")
    parser.set_defaults(run=run_eval)

    parser = subparsers.add_parser(
        "plot", help="curves of training runs",
        description="Draw loss, validation loss, learning rate, gradient norm and tokens per second of training runs "
                    "over their steps.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run, or its metrics.jsonl")
    parser.add_argument("--out", default="training.png", metavar="FILE",
                        help="PNG file to write; an existing one is replaced (default: %(default)s)")
    parser.set_defaults(run=run_plot)


def run_eval(args: argparse.Namespace) -> None:
    """Run ``flexolmo eval``."""
    from flexolmo_megatron.commands.console import show
    from flexolmo_megatron.evaluation.candidates import parse_candidate, parse_domains
    from flexolmo_megatron.evaluation.compare import Options, compare
    from flexolmo_megatron.evaluation.report import write_report
    from flexolmo_megatron.files import check_free

    check_free(args.out)
    candidates = [parse_candidate(text) for text in args.model]
    options = Options(max_bytes=args.max_bytes, batch_tokens=args.batch_tokens, text_key=args.text_key,
                      max_bad=args.max_bad, routing=args.routing, dtype=args.dtype, anchor=args.anchor,
                      rows=args.rows)
    results = compare(candidates, parse_domains(args.domain), options, args.reference)
    show(results.to_rich())
    for path in write_report(results, args.out):
        print(path)


def run_plot(args: argparse.Namespace) -> None:
    """Run ``flexolmo plot``."""
    from flexolmo_megatron.evaluation.metrics import read_metrics
    from flexolmo_megatron.evaluation.plots import plot_curves

    plot_curves({run: read_metrics(run) for run in args.runs}, args.out)
    print(args.out)
