"""``flexolmo launch``: anchor, experts, merge and router tuning as jobs of a Slurm cluster."""

import argparse
import sys

from flexolmo_megatron.errors import FlexOlmoError

EXAMPLE = """\
example of a small CONFIG.yaml (examples/slurm/launch.yaml has all of it):
  out: runs/wards
  slurm: {partition: gpu, time: '12:00:00', nodes: 2, gpus_per_node: 8, setup: [source .venv/bin/activate]}
  published: anchor
  experts:
    config: [expert.yaml]
    each:
      notes: {documents: [notes/*.jsonl], options: ['data.train=[data/notes]']}
      code: {documents: [code/*.jsonl], options: ['data.train=[data/code]']}
  merge: {domains: {notes: [notes_valid/*.jsonl]}}

options of CONFIG.yaml:

"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "launch", help="train and merge as jobs of a Slurm cluster",
        description="Submit up to four jobs to Slurm: the public anchor; an array job that trains all experts at\n"
                    "once; if all of them succeed, the merge with its evaluation; and then router tuning. Jobs that\n"
                    "are preempted or reach their time limit save, requeue themselves and go on. The scripts are kept\n"
                    "in OUT/slurm, one log per process in OUT/logs, and what happened in OUT/launch.log. A second\n"
                    "launch does what is missing.",
        epilog=EXAMPLE + _describe_options(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the jobs, and what they ask of Slurm")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the scripts and how they would be submitted, and what is missing; write nothing")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE",
                        help="single options, for example slurm.partition=debug")
    parser.set_defaults(run=run)


def _describe_options() -> str:
    from flexolmo_megatron.config.describe import describe
    from flexolmo_megatron.launch.config import AnchorJob, Expert, ExpertsJob, LaunchConfig, MergeJob, RouterJob

    sections = {"": LaunchConfig, "anchor.": AnchorJob, "experts.": ExpertsJob, "experts.each.NAME.": Expert,
                "merge.": MergeJob, "router.": RouterJob}
    return "\n".join(describe(schema, prefix) for prefix, schema in sections.items())


def run(args: argparse.Namespace) -> None:
    """Run ``flexolmo launch``."""
    from flexolmo_megatron.launch.check import check_arguments, check_layouts, missing_inputs
    from flexolmo_megatron.launch.load import load_launch
    from flexolmo_megatron.launch.slurm import plan_jobs, require_sbatch, show, submit

    config = load_launch(args.config, args.overrides)
    jobs = plan_jobs(config)
    stages = {job.stage: job.experts for job in jobs}
    check_arguments(config, stages)
    check_layouts(config, stages)
    if not jobs:
        print(f"{config.out}: everything is there already")
    elif args.dry_run:
        print(show(config, jobs), end="")
        for sentence in missing_inputs(config, stages):
            print(f"a launch would be refused now: {sentence}", file=sys.stderr)
    else:
        require_sbatch()
        if missing := missing_inputs(config, stages):
            rest = f" (and {len(missing) - 3} more; see --dry-run)" if len(missing) > 3 else ""
            raise FlexOlmoError("; ".join(missing[:3]) + rest)
        for stage, number in submit(config, jobs).items():
            print(f"{stage}: job {number}, {config.out}/slurm/{stage}.sbatch")
        print(f"what happens is in {config.out}/launch.log")
