"""A launch's configuration to batch scripts: the templates of ``launch/templates``, filled in.

The templates are Slurm batch files with ``{{name}}`` where something goes in. Everything from the configuration is
quoted for the shell, except ``setup`` and ``python``, which are meant for it.
"""

import re
import shlex
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from flexolmo_megatron.launch.config import (
    LaunchConfig,
    MergeJob,
    SlurmConfig,
    expert_names,
    published_anchor,
    training_of,
)
from flexolmo_megatron.launch.load import job_slurm, training_config


class _BatchFile(Template):
    """string.Template with ``{{name}}``, which no shell script has a use for."""

    pattern = r"\{\{(?:(?P<named>[a-z_]+)\}\}|(?P<braced>(?!))|(?P<escaped>(?!))|(?P<invalid>))"


def template(name: str) -> str:
    """The text of a file in ``launch/templates``."""
    return files("flexolmo_megatron.launch").joinpath("templates", name).read_text(encoding="utf-8")


def package_of(config: LaunchConfig, name: str) -> Path:
    """Where an expert's job leaves its package."""
    return Path(config.out, "experts", name, "package")


def render_anchor(config: LaunchConfig) -> str:
    """The script that trains the anchor and publishes it."""
    job = config.anchor
    assert job is not None
    return _render("anchor", config, "logs/anchor.log", training=_training(job.preset, job.config, job.options),
                   documents=shlex.join(job.documents), embed=shlex.join(config.embed_arguments))


def render_experts(config: LaunchConfig, names: list[str]) -> str:
    """The script of the array job that trains the experts ``names``; other indices of the array are left out."""
    job = config.experts
    assert job is not None
    every = list(job.each)
    cases = "\n".join(_case(config, index, name) for index, name in enumerate(every))
    return _render("experts", config, "logs/experts_%a.log", array=",".join(str(every.index(name)) for name in names),
                   anchor=shlex.quote(published_anchor(config)), cases=cases,
                   embed=shlex.join([*config.embed_arguments, *job.embed_arguments]))


def _case(config: LaunchConfig, index: int, name: str) -> str:
    """The lines of one expert in the script of all experts."""
    job = config.experts
    assert job is not None
    expert, training = job.each[name], training_config(config, "experts", name)
    merged = training_of(job, expert)
    vector = '"$out/experts/$name/domain.npz"' if expert.domain_vector is None else shlex.quote(expert.domain_vector)
    described = [word for option in ("owner", "licence", "contact") if getattr(expert, option)
                 for word in (f"--{option}", getattr(expert, option))]
    dense = []  # a dense copy says nothing about itself
    if not training.expert.coordination:
        dense = ['--name "$name" --anchor "$anchor" --domain-vector "$vector"',
                 f"--router-window {training.expert.router_window}"]
    return "\n".join((
        f"{index})",
        f"    name={shlex.quote(name)}",
        f"    vector={vector}",
        f"    documents=({shlex.join(expert.documents)})",
        f"    training=({_training(merged.preset, merged.config, merged.options)})",
        f"    package=({' '.join([shlex.join(described), *dense])})",
        "    ;;",
    ))


def render_merge(config: LaunchConfig) -> str:
    """The script that merges and evaluates."""
    job = config.merge
    assert job is not None
    names = expert_names(config)
    packages = [f'"$out"/experts/{shlex.quote(name)}/package' for name in names]
    packages += [shlex.quote(path) for path in job.packages]
    return _render("merge", config, "logs/merge.log", anchor=shlex.quote(published_anchor(config)),
                   packages="\n".join(f"        {path}" for path in packages), merge=shlex.join(job.merge_arguments),
                   evaluation=_evaluation(names, job, {"merged": "$out/merged"}, "evaluation"))


def render_router(config: LaunchConfig) -> str:
    """The script that tunes the merged model's router and evaluates."""
    job = config.router
    assert job is not None and config.merge is not None
    names = expert_names(config)
    models = {"merged": "$out/merged", "tuned": "$run/model"}
    return _render("router", config, "logs/router.log", anchor=shlex.quote(published_anchor(config)),
                   training=_training(job.preset, job.config, job.options),
                   evaluation=_evaluation(names, config.merge, models, "evaluation_tuned"))


def _evaluation(names: list[str], merge: MergeJob, models: dict[str, str], folder: str) -> str:
    """The public model, others, and the last of them without each expert, on every domain."""
    domains, arguments = merge.domains, merge.eval_arguments
    if not domains:
        return ""
    words = ['--model public="$anchor"', *(f'--model {name}="{path}"' for name, path in models.items())]
    last = list(models.values())[-1]
    words += [f'--model {shlex.quote(f"without {name}=")}"{last}"@-{shlex.quote(name)}' for name in names]
    words += [f"--domain {shlex.quote(f'{name}={pattern}')}" for name, patterns in domains.items()
              for pattern in patterns]
    words += [shlex.join(arguments)] if arguments else []
    lines = [f'single eval --out "$out/{folder}" --reference public --routing', *words]
    return f'if [ ! -e "$out/{folder}" ]; then\n    ' + " \\\n        ".join(lines) + "\nfi"


def _training(preset: str | None, configs: list[str], options: list[str]) -> str:
    words = ["--preset", preset] if preset is not None else []
    return shlex.join([*words, *(word for path in configs for word in ("--config", path)), *options])


def _render(stage: str, config: LaunchConfig, log: str, **values: str) -> str:
    return render_script(stage, stage, config.out, job_slurm(config, stage), log, **values)


def render_script(name: str, stage: str, out: str, slurm: SlurmConfig, log: str, **values: str) -> str:
    """The batch file of one job.

    Args:
        name: of the template.
        stage: of the launch, for the job's name.
        out: folder of the launch.
        slurm: what the job asks for.
        log: of the job, below ``out``.
        values: what else goes into the template.
    """
    text = _BatchFile(template(f"{name}.sbatch")).substitute(
        sbatch="\n".join(f"#SBATCH {line}" for line in _sbatch_lines(stage, out, slurm, log)),
        setup="\n".join(slurm.setup), out=shlex.quote(out), python=slurm.python, requeues=slurm.requeues,
        warn_seconds=slurm.warn_seconds, srun_options=shlex.join(_options(slurm.srun_options)), **values)
    lines = [line.rstrip() for line in text.splitlines()]
    # Where nothing was filled in, one empty line is enough.
    kept = [line for index, line in enumerate(lines) if line or index == 0 or lines[index - 1]]
    return "\n".join(kept) + "\n"


def _sbatch_lines(stage: str, out: str, slurm: SlurmConfig, log: str) -> list[str]:
    options: dict[str, Any] = {
        "job-name": f"{Path(out).name}-{stage}", "account": slurm.account, "partition": slurm.partition,
        "qos": slurm.qos, "time": slurm.time, "nodes": slurm.nodes,
        "ntasks-per-node": slurm.processes_per_node, "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node or None, "output": f"{out}/{log}", "open-mode": "append",
    }
    given = {name: value for name, value in options.items() if value is not None}
    # Not to the batch shell, which has nothing to do but to wait for the processes that hear it.
    given |= {"requeue": True, "signal": f"USR1@{slurm.warn_seconds}", "kill-on-invalid-dep": "yes"}
    # sbatch reads these lines, not a shell: in quotation marks all but these, which load.py refuses, is itself.
    return [word if re.fullmatch(r"[\w./:=,@%+-]+", word) else '{}="{}"'.format(*word.split("=", 1))
            for word in _options(given | slurm.options)]


def _options(options: dict[str, Any]) -> list[str]:
    """``{mem: 0, exclusive: true}`` as ``--mem=0`` and ``--exclusive``; false leaves an option out."""
    return [f"--{name}" if value is None or value is True else f"--{name}={value}"
            for name, value in options.items() if value is not False]
