"""``flexolmo suite``: models on the tasks of the paper."""

import argparse
import logging
import os
import sys
from pathlib import Path

from flexolmo_megatron.commands.models import add_candidates_option, add_loading_options

_EXAMPLES = """\
examples:
  flexolmo suite --model merged=merged --model 'no code=merged@-code' --out suite
  flexolmo suite --model merged=merged --tasks MC9 MMLU gsm8k --limit 100 --out suite
  flexolmo suite --model merged=merged --model 'no code=merged@-code' --out suite --run-code \\
    --judge-url http://localhost:8000/v1 --judge-model meta-llama/Llama-3.3-70B-Instruct
    # adds Code4, NewsG and PoemG to the first line's results: the average is over all groups
local data: --data DIR reads DIR/TASK/SPLIT.jsonl (.jsonl.gz, .parquet), with the data set's own columns, for instance
  DIR/arc_easy/train.jsonl, DIR/arc_easy/test.jsonl or DIR/mmlu/mmlu_anatomy/dev.jsonl
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "suite", help="the paper's 31 tasks, over lm-evaluation-harness",
        description="Run models on the paper's tasks (MC9, GEN5, MMLU, MMLU-Pro, AGIEval, BBH, Math2, NewsG, PoemG,\n"
                    "SciRIFF5, Code4) and print the table of group averages, in percent, higher is better. Writes\n"
                    "results.json (with standard errors, how many contexts were too long for the model, and where\n"
                    "each task differs from the published evaluation) and results.md. The same command goes on with\n"
                    "a run that was interrupted; --tasks, --run-code and --judge-url may come later, and what was\n"
                    "scored is kept.",
        epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_candidates_option(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR",
                        help="folder for the results: new, or that of an earlier run with the same settings")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="groups and tasks to run (default: all)")
    parser.add_argument("--suite", type=Path, metavar="FILE", help="another suite, in the form of suites/paper.yaml")
    parser.add_argument("--limit", type=int, default=1000, metavar="N",
                        help="documents of each single task, at most (default: %(default)s, as in the paper's runs)")
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help="folder of local data sets (see below); those that it lacks come from Hugging Face")
    parser.add_argument("--judge-url", metavar="URL",
                        help="OpenAI-compatible endpoint, such as http://localhost:8000/v1, for NewsG and PoemG, which "
                             "are not run without it")
    parser.add_argument("--judge-model", default="meta-llama/Llama-3.3-70B-Instruct", metavar="NAME",
                        help="model to ask there (default: the paper's, %(default)s)")
    parser.add_argument("--judge-key-variable", default="OPENAI_API_KEY", metavar="NAME",
                        help="environment variable that holds the endpoint's key (default: %(default)s)")
    parser.add_argument("--run-code", action="store_true",
                        help="run Code4, which runs programs that the model has written, in processes with limits but "
                             "with this user's rights: do it in a container")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N",
                        help="sequences that are computed at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampled answers (default: %(default)s)")
    add_loading_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run ``flexolmo suite``."""
    # The harness warns those who write tasks: of what a configuration leaves to defaults, of its own command's options.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        # Its bars cannot be switched off one by one, and fill a log; tqdm reads this once, when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")

    from rich.markdown import Markdown

    from flexolmo_megatron.commands.console import show
    from flexolmo_megatron.evaluation.candidates import parse_candidate
    from flexolmo_megatron.evaluation.suites.judge import Judge
    from flexolmo_megatron.evaluation.suites.load import PAPER, load_suite
    from flexolmo_megatron.evaluation.suites.run import SuiteOptions, run_suite

    judge = Judge(args.judge_url, args.judge_model, args.judge_key_variable) if args.judge_url else None
    options = SuiteOptions(args.tasks, args.limit, args.data, judge, args.run_code, args.batch_size, args.dtype,
                           args.anchor, args.rows, args.seed)
    results = run_suite(load_suite(args.suite or PAPER), [parse_candidate(text) for text in args.model], args.out,
                        options)
    show(Markdown(results.to_markdown()))
    for path in results.save(args.out):
        print(path)
