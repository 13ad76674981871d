"""A comparison as jobs of a Slurm cluster: an array for all steps that do not need each other, one after the other."""

import shlex
from pathlib import Path

from flexolmo_megatron.compare.plan import Comparison
from flexolmo_megatron.launch.render import render_script
from flexolmo_megatron.launch.slurm import Job


def plan_arrays(comparison: Comparison) -> list[Job]:
    """Return the array jobs that are still needed, in order; each waits for the one before it.

    Raises:
        FlexOlmoError: a step was done with other options.
    """
    config, plan = comparison.config, comparison.plan
    levels: dict[int, list[str]] = {}
    for name in plan.steps:
        if not plan.is_done(name):
            levels.setdefault(plan.level(name), []).append(name)
    jobs: list[Job] = []
    for _, names in sorted(levels.items()):
        stage = f"steps_{len(jobs)}"
        text = render_script("compare", stage, config.out, config.slurm, f"logs/{stage}_%a.log",
                             array=f"0-{len(names) - 1}", steps="\n".join(f"    {shlex.quote(name)}" for name in names))
        jobs.append(Job(stage, Path(config.out, "slurm", f"{stage}.sbatch"), text, [job.stage for job in jobs[-1:]]))
    return jobs
