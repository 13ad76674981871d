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


def add_where_options(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add --workers and --slurm: where documents are worked on. ``note`` is a sentence for the help."""
    parser.add_argument("--workers", type=int, default=usable_processors(), metavar="N",
                        help=f"processes; the output does not depend on it. {note + '. ' * bool(note)}(default: the "
                             "usable processors, here %(default)s)")
    parser.add_argument("--slurm", metavar="FILE",
                        help="work in tasks of a Slurm job array instead, and wait for them: a YAML file with "
                             "partition and time, as in '04:00:00', and if need be tasks (that run at once: 100), "
                             "cpus_per_task (1), memory (of a processor: 4G), account, qos, setup (a list of shell "
                             "commands) and sbatch (further options by name). Files and output must be on a file "
                             "system that all nodes see")
