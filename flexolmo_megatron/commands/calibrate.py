"""``flexolmo calibrate``: a temperature for a merged model's router, chosen on public text."""

import argparse
import sys
from typing import TYPE_CHECKING

from flexolmo_megatron.commands.documents import add_text_key_option
from flexolmo_megatron.errors import FlexOlmoError

if TYPE_CHECKING:
    from rich.table import Table

    from flexolmo_megatron.evaluation.temperature import Calibration


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "calibrate", help="choose a merged model's router temperature on public text",
        description="Divide all router rows and biases by the number that needs the fewest bits per byte on public "
                    "documents. Where an owner is left out, the number that was found without that owner's expert is "
                    "used (strict), or with --rows untuned none.")
    parser.add_argument("merged", metavar="MERGED", help="merged model whose router was not tuned")
    parser.add_argument("--public", nargs="+", required=True, metavar="DOCS",
                        help="public documents: a file (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or a quoted pattern")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="new folder for the model, which keeps its untuned rows (Megatron checkpoint)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 0.7, 1.0, 1.4, 2.0], metavar="T",
                        help="to try; below 1 the router becomes more decided (default: %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=100_000, metavar="N",
                        help="bytes of text, from the first document on (default: %(default)s)")
    add_text_key_option(parser)
    parser.add_argument("--max-bad", type=int, default=100, metavar="N",
                        help="how many empty or broken documents are skipped before the command stops "
                             "(default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from tqdm import tqdm

    from flexolmo_megatron.commands.console import show
    from flexolmo_megatron.evaluation.perplexity import limit_bytes
    from flexolmo_megatron.evaluation.temperature import calibrate
    from flexolmo_megatron.training.documents import BadDocuments, stream_documents

    if args.max_bytes < 1:
        raise FlexOlmoError(f"--max-bytes {args.max_bytes}: expected at least 1")
    bad = BadDocuments(args.max_bad)
    stream = stream_documents(args.public, args.text_key, bad)
    texts = list(limit_bytes((document.text for document in stream), args.max_bytes))
    if bad.counts:
        print(f"skipped {bad.report()}", file=sys.stderr)
    with tqdm(desc="calibrate", unit="token", disable=None) as bar:
        found = calibrate(args.merged, texts, args.out, args.temperatures, progress=bar.update)
    show(_table(found, args.temperatures))
    print(args.out)


def _table(found: "list[Calibration]", temperatures: list[float]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title="bits per byte on public text, by temperature", title_justify="left")
    for column in ("rows", *(f"{temperature:g}" for temperature in temperatures), "chosen"):
        table.add_column(column, justify="left" if column == "rows" else "right")
    for one in found:
        table.add_row(Text(one.name), *(f"{one.bits_per_byte[temperature]:.4f}" for temperature in temperatures),
                      f"{one.temperature:g}")
    return table
