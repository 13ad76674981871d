"""The option --rows, which several verbs share."""

import argparse


def add_rows_option(parser: argparse.ArgumentParser) -> None:
    """Add --rows; see ``convert/rows.py``."""
    parser.add_argument(
        "--rows", choices=("strict", "tuned", "untuned"), default="strict",
        help="of a model whose router was tuned, which router rows to use. strict: the tuned ones; where experts are "
             "left out, a set that was tuned without them and their owners' proxies, or else the untuned ones, so that "
             "nothing that was derived from those owners' data is left. tuned: the tuned ones whatever is left out. "
             "untuned: those from before the tuning (default: %(default)s)")
