"""``flexolmo VERB …``: parses arguments, calls library functions, turns errors into one sentence and a status."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from flexolmo_megatron import __version__
from flexolmo_megatron.errors import REQUEUE_STATUS, FlexOlmoError, StopRequested

COMMANDS = ("data", "mix", "train", "embed", "proxy", "convert", "exchange", "calibrate", "generate", "evaluation",
            "suite", "audit", "compare", "bench", "plan", "launch")
"""Modules of ``flexolmo_megatron.commands``, in the order of the help."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="flexolmo",
        description="FlexOlmo (arXiv 2507.07024) on Megatron-core: data owners train experts apart, a "
        "coordinator merges them, users switch any owner's data on or off.",
    )
    parser.add_argument("--version", action="version", version=f"flexolmo-megatron {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in COMMANDS:
        import_module(f"flexolmo_megatron.commands.{name}").register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 2 bad input, 75 asked to stop (all saved), 130 interrupted."""
    try:
        parser = build_parser()
        args, rest = parser.parse_known_args(argv)
        # argparse gives up on KEY=VALUE arguments that follow an option; here they may stand anywhere.
        if not hasattr(args, "overrides") or any(word.startswith("-") for word in rest):
            parser.parse_args(argv)
        else:
            args.overrides += rest
        args.run(args)
        sys.stdout.flush()
    except FlexOlmoError as error:
        print(f"flexolmo: {error}", file=sys.stderr)
        return 2
    except StopRequested as stop:
        print(f"flexolmo: {stop}", file=sys.stderr)
        return REQUEUE_STATUS
    except KeyboardInterrupt:
        print("flexolmo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        _discard_output()
        return 141
    except PermissionError as error:  # pathlib raises it where a file in a closed folder is only asked for
        print(f"flexolmo: {error.filename}: permission denied; expected something that this user may use",
              file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG and error.filename:
            print(f"flexolmo: {error.filename}: expected a shorter name", file=sys.stderr)
            return 2
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename:
            raise
        _discard_output()
        print(f"flexolmo: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _discard_output() -> None:
    """Send what is left in the buffer nowhere: Python would complain again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
