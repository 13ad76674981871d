"""Options that the verbs which read documents share."""

import argparse
import os


def usable_processors() -> int:
    """Processors that this process may run on: the default of --workers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_text_key_option(parser: argparse.ArgumentParser) -> None:
    """Add --text-key."""
    parser.add_argument("--text-key", default="text", metavar="KEY",
                        help="key of the JSON objects, or Parquet column, that holds a document (default: %(default)s)")
