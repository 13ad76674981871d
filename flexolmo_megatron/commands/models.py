"""Options that the verbs which open or load models share."""

import argparse


def add_rows_option(parser: argparse.ArgumentParser) -> None:
    """Add --rows; see ``convert/rows.py``."""
    parser.add_argument(
        "--rows", choices=("strict", "tuned", "untuned"), default="strict",
        help="of a model whose router was tuned, which router rows to use. strict: the tuned ones; where experts are "
             "left out, a set that was tuned without them and their owners' proxies, or else the untuned ones, so that "
             "nothing that was derived from those owners' data is left. tuned: the tuned ones whatever is left out. "
             "untuned: those from before the tuning (default: %(default)s)")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, --anchor and --rows; see ``load_model``."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="to compute in (default: %(default)s)")
    parser.add_argument("--anchor", metavar="PATH",
                        help="where the anchor of pairs is now (default: where it was when each was trained)")
    add_rows_option(parser)


def add_candidates_option(parser: argparse.ArgumentParser) -> None:
    """Add --model; see ``evaluation/candidates.py``."""
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH[@EXPERTS]",
                        help="a model and what to call it (repeatable): a Megatron checkpoint, the folder of a "
                             "training run, or a Hugging Face directory. @a,b uses only the experts a and b beside "
                             "the public one; @-a,-b uses all but a and b. A checkpoint that comes several times is "
                             "loaded once")


def add_sampling_options(parser: argparse.ArgumentParser, *, temperature: float, top_k: int, top_p: float) -> None:
    """Add --temperature, --top-k and --top-p with their defaults; see ``inference/generate.py``."""
    parser.add_argument("--temperature", type=float, default=temperature, metavar="T",
                        help="0 takes the most probable token; above 0, sample from the logits divided by T "
                             "(default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=top_k, metavar="N",
                        help="sample among the N most probable tokens; 0 for all (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=top_p, metavar="P",
                        help="sample among the most probable tokens that together reach the probability P, from 0 to 1 "
                             "(default: %(default)s)")
