"""``flexolmo compare``: every method of the comparison, trained, evaluated and in one table."""

import argparse
import sys
from typing import TYPE_CHECKING

from flexolmo_megatron.errors import FlexOlmoError

if TYPE_CHECKING:
    from flexolmo_megatron.compare.plan import Comparison

_EXAMPLE = """\
example:
  flexolmo compare examples/compare/small.yaml out=runs/compare public.train=[news.train.jsonl.gz] --dry-run

router rows that start at another model's document embeddings, beside such that start at the anchor's hidden states:
  flexolmo compare … 'ablations=[trained rows]' 'variants.embedder init={embed.embedder: NAME of the model}'

on several devices (training is data-parallel): torchrun --nproc-per-node N -m flexolmo_megatron.cli compare …

options of CONFIG.yaml and KEY=VALUE:

"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "compare", help="train and evaluate FlexOlmo, its baselines and ablations on your text",
        description="From one YAML file, train for each seed: the public anchor, the owners' experts beside it, "
                    "merged\nand router-tuned; ablations; dense models of the owners, their soup, BTM, BTX; "
                    "unrestricted mixtures\nof one and two times the FLOPs. Then measure the bits per byte of every "
                    "method on held-out text of each\ndomain and on mixed text. OUT/report gets the table "
                    "(Markdown, CSV, JSON) and pictures. Every step has\na folder in OUT; the same command goes on "
                    "after a stop, and does what a changed file adds.",
        epilog=_EXAMPLE + _describe_options(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml", help="what to compare")
    parser.add_argument("--dry-run", action="store_true",
                        help="list all steps, with training tokens and FLOPs, and which are done; write nothing")
    parser.add_argument("--only", action="append", default=[], metavar="STEP",
                        help="do this step alone (repeatable), as --dry-run calls it; what it needs must be done")
    parser.add_argument("--slurm", action="store_true",
                        help="do the steps in jobs of a Slurm cluster, an array for all that do not need each other; "
                             "the section slurm says what a task asks for. With --dry-run, print the scripts")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE",
                        help="single options, for example steps.owner=300 owner.data.public_share=0.25")
    parser.set_defaults(run=run)


def _describe_options() -> str:
    from flexolmo_megatron.compare.config import CompareConfig, Texts
    from flexolmo_megatron.config.describe import describe

    return describe(CompareConfig) + "\n" + describe(Texts, "owners.NAME.")


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from flexolmo_megatron.compare.config import check_training, load_compare
    from flexolmo_megatron.runtime.setup import prepare, world_size

    config = load_compare(args.config, args.overrides)
    prepare()
    from flexolmo_megatron.commands.console import show
    from flexolmo_megatron.compare.check import check_tools
    from flexolmo_megatron.compare.listing import list_steps
    from flexolmo_megatron.compare.plan import build_comparison
    from flexolmo_megatron.compare.report import read_table
    from flexolmo_megatron.compare.steps import choose, run_steps

    comparison = build_comparison(config)
    check_training(comparison.runs, config.slurm.nodes * config.slurm.processes_per_node if args.slurm else
                   world_size())
    if not args.slurm:  # the jobs may have another Python, which they check
        check_tools(comparison)
    names = choose(comparison.plan, args.only)
    if (args.slurm or args.dry_run) and comparison.skipped:
        print(*comparison.skipped, sep="\n", file=sys.stderr)
    if args.slurm:
        _submit(comparison, args)
        return
    if args.dry_run:
        show(list_steps(comparison, names))
        return
    from flexolmo_megatron.runtime.setup import initialize
    from flexolmo_megatron.training.console import say

    initialize(seed=config.seeds[0], timeout_minutes=24 * 60)  # the others wait while rank 0 evaluates
    for line in comparison.skipped:
        say(line)
    run_steps(comparison.plan, names, say)
    if "report" in names:
        say(f"\n{read_table(comparison).to_markdown()}")
        say(f"tables and pictures: {comparison.plan.out / 'report'}")


def _submit(comparison: "Comparison", args: argparse.Namespace) -> None:
    from flexolmo_megatron.compare.slurm import plan_arrays
    from flexolmo_megatron.launch.slurm import require_sbatch, show, submit

    if args.only:
        raise FlexOlmoError("--slurm and --only: expected one of them, the jobs do single steps themselves")
    jobs, out = plan_arrays(comparison), comparison.config.out
    if not jobs:
        print(f"{out}: everything is there already")
    elif args.dry_run:
        print(show(comparison.config, jobs), end="")
    else:
        require_sbatch()
        for stage, number in submit(comparison.config, jobs).items():
            print(f"{stage}: job {number}, {out}/slurm/{stage}.sbatch")
        print(f"what happens is in {out}/launch.log")
