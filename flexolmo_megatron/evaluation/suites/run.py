"""Running a suite: every model on every task; what is done is kept, so that the same call goes on after a stop."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.evaluation.candidates import Candidate, candidate_settings, check_candidates, file_stamp
from flexolmo_megatron.evaluation.settings import check_same_settings
from flexolmo_megatron.evaluation.suites.judge import Judge
from flexolmo_megatron.evaluation.suites.load import Suite, SuiteTask, build_task, check_documents, harness_tasks
from flexolmo_megatron.evaluation.suites.results import SuiteResults, TaskScore, mean_score
from flexolmo_megatron.files import read_json, write_json
from flexolmo_megatron.inference.model import free_memory, load_model

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

    from flexolmo_megatron.evaluation.suites.language_model import HarnessModel

_BOOTSTRAP_SAMPLES = 100
"""Of metrics whose standard error has no closed form."""
SETUP = "setup.json"


@dataclass
class SuiteOptions:
    """How to run a suite."""

    tasks: Sequence[str] = ()
    """Groups and tasks to run; empty for all."""
    limit: int | None = 1000
    """Documents of each task, at most; None for all. The research took 1,000."""
    data: Path | None = None
    """Folder of local data sets; see ``load.build_task``."""
    judge: Judge | None = None
    """For the tasks whose texts are judged; without one they are not run."""
    run_code: bool = False
    """Run programs that the model has written; without it, those tasks are not run."""
    batch_size: int = 8
    """Sequences that are computed at a time."""
    dtype: str = "float32"
    anchor: str | None = None
    rows: str = "strict"
    seed: int = 0
    """Of sampled answers."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise FlexOlmoError(f"--{name.replace('_', '-')} {value}: expected at least 1")


def chosen_tasks(suite: Suite, names: Sequence[str]) -> list[str]:
    """The tasks of the suite's groups that ``names`` (groups and tasks, in any case; empty for all) choose.

    Raises:
        FlexOlmoError: an unknown name.
    """
    everything = [task for tasks in suite.groups.values() for task in tasks]
    known = suite.groups | {task: [task] for task in everything}
    in_any_case = {name.lower(): tasks for name, tasks in known.items()} | known
    for name in names:
        if name.lower() not in in_any_case:
            shown = [*suite.groups, *everything]
            raise FlexOlmoError(f"--tasks {name}: the suite has no such group or task{nearest(name, shown)}: expected "
                                f"some of {', '.join(shown)}")
    wanted = {task for name in names for task in in_any_case.get(name) or in_any_case[name.lower()]}
    return [task for task in everything if not names or task in wanted]


def _missing(suite: Suite, name: str, options: SuiteOptions) -> str | None:
    """Why a task cannot be run with these options; None if it can."""
    for _, task, _ in suite.leaves(name):
        if task.needs == "judge" and options.judge is None:
            return "no --judge-url was given"
        if task.needs == "code" and not options.run_code:
            return "it runs programs that the model writes, which --run-code allows"
    return None


def _limit(task: SuiteTask, limit: int | None) -> int | None:
    return min((number for number in (limit, task.limit) if number is not None), default=None)


def score_task(lm: "HarnessModel", name: str, task: SuiteTask, built: "ConfigurableTask",
               limit: int | None) -> TaskScore:
    """Run one task of the harness.

    Raises:
        FlexOlmoError: the harness does not compute the task's metric.
    """
    from lm_eval.evaluator import evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would fork for a bootstrap, beside CUDA
    truncated = lm.truncated
    found = evaluate(lm=lm, task_dict={"tasks": {name: built}}, limit=_limit(task, limit),
                     bootstrap_iters=_BOOTSTRAP_SAMPLES, log_samples=False, confirm_run_unsafe_code=False)
    values = {key: value for key, value in found["results"][name].items() if key.partition(",")[0] == task.metric}
    key = next((key for key in values if task.filter in (None, key.partition(",")[2])), None)
    if key is None:
        raise FlexOlmoError(f"task {name}: there is no metric {task.metric!r}"
                            f"{f' with the filter {task.filter!r}' if task.filter else ''}: the harness computed "
                            f"{', '.join(found['results'][name])}")
    documents = found["n-samples"][name]["effective"]
    value = float(values[key])
    stderr = found["results"][name].get(key.replace(",", "_stderr,", 1))
    return TaskScore(100 * value, 100 * stderr if isinstance(stderr, int | float) else None, documents,
                     lm.truncated - truncated)


class _Done:
    """Scores that are kept in a folder, one file per model and task, with the settings that they belong to."""

    def __init__(self, out: Path, setup: dict[str, Any], data: Path | None) -> None:
        self._folder, self._data = out / "tasks", data
        if (out / SETUP).exists():
            before = read_json(out / SETUP, "the settings of a suite's run")
            if isinstance(before, dict) and None in (before.get("judge"), setup["judge"]):
                # Without a judge no judged task is run: it may come with a later start, as --run-code may.
                judge = {"judge": before.get("judge") or setup["judge"]}
                before, setup = before | judge, setup | judge
            check_same_settings(out, "a run", before, setup)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FlexOlmoError(f"{out} already exists and holds no run of a suite; name a new directory")
        self._setup = setup

    def begin(self) -> None:
        """Make the folder; nothing is written before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder.parent / SETUP, self._setup)

    def _path(self, model: str, leaf: str, task: SuiteTask) -> Path:
        # With what the task is: the user may have changed the suite's file, or the task's data, since.
        local = self._data is not None and (self._data / leaf).is_dir()
        key = repr((model, leaf, replace(task, verified="", differs=""),
                    file_stamp(self._data / leaf) if local else None))
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    def get(self, model: str, leaf: str, task: SuiteTask) -> TaskScore | None:
        path = self._path(model, leaf, task)
        if not path.exists():
            return None
        value = read_json(path, "a task's score")
        if "truncated" not in value:  # of a version that did not count it
            return None
        return TaskScore(value["score"], value["stderr"], value["documents"], value["truncated"])

    def add(self, model: str, leaf: str, task: SuiteTask, score: TaskScore) -> None:
        write_json(self._path(model, leaf, task), {"model": model, "task": leaf, **asdict(score)})


def _check_tasks(suite: Suite, names: Sequence[str], candidates: Sequence[Candidate], options: SuiteOptions,
                 done: _Done) -> None:
    """Find, before any model is loaded, what would stop a task that some candidate still lacks; keeps no data set.

    Raises:
        FlexOlmoError: a task's data is missing or does not fit it, a model's sequences are too short, the judge does
            not answer.
    """
    from flexolmo_megatron.evaluation.suites.language_model import prompt_room

    lengths = {candidate.name: open_model(candidate.path).card.model.max_position_embeddings
               for candidate in candidates}
    judged = False
    for leaf, task, file in tqdm([leaf for name in names for leaf in suite.leaves(name)], "checking tasks",
                                 unit=" tasks", leave=False, disable=None):
        lacking = [candidate.name for candidate in candidates if done.get(candidate.name, leaf, task) is None]
        if not lacking:
            continue
        built = build_task(leaf, task, file, options.data, options.judge)
        check_documents(built, _limit(task, options.limit))
        if built.config.output_type == "generate_until":
            for name in lacking:
                try:
                    prompt_room(built.config.generation_kwargs, lengths[name])
                except FlexOlmoError as error:
                    raise FlexOlmoError(f"{name} on {leaf}: {error}") from None
        judged |= task.needs == "judge"
    if judged and options.judge is not None:
        options.judge.ask("Answer with one word: ready.")


def run_suite(suite: Suite, candidates: Sequence[Candidate], out: Path, options: SuiteOptions) -> SuiteResults:
    """Run a suite; reports each score on standard error as it comes.

    Args:
        suite: what to run.
        candidates: models and their experts; a checkpoint is loaded once for all that share it.
        out: folder of the results, new or of an interrupted run with the same settings.
        options: how to run.

    Raises:
        FlexOlmoError: see ``chosen_tasks``, ``build_task``, ``check_documents``, ``prompt_room``, ``load_model`` and
            ``Judge``; ``out`` holds other results.
    """
    harness_tasks()
    from flexolmo_megatron.evaluation.suites.language_model import HarnessModel

    names = chosen_tasks(suite, options.tasks)
    skipped = {name: reason for name in names if (reason := _missing(suite, name, options))}
    names = [name for name in names if name not in skipped]
    if not names:
        raise FlexOlmoError("nothing to run: " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    if options.data is not None and not options.data.is_dir():
        raise FlexOlmoError(f"--data {options.data} is no folder: expected one of local data sets")
    check_candidates(candidates)
    setup = {
        "suite": suite.name, "limit": options.limit, "dtype": options.dtype, "rows": options.rows, "seed": options.seed,
        "data": None if options.data is None else str(options.data),
        "judge": None if options.judge is None else options.judge.model,
        **candidate_settings(candidates),
    }
    done = _Done(out, setup, options.data)
    _check_tasks(suite, names, candidates, options, done)
    done.begin()
    scores: dict[str, dict[str, TaskScore]] = {candidate.name: {} for candidate in candidates}
    for path in dict.fromkeys(candidate.path for candidate in candidates):
        model = load_model(path, getattr(torch, options.dtype), anchor=options.anchor, rows=options.rows)
        for candidate in candidates:
            if candidate.path != path:
                continue
            lm = HarnessModel(model, candidate.experts(model.expert_names), batch_size=options.batch_size,
                              seed=options.seed)
            for name in names:
                parts = []
                for leaf, task, file in suite.leaves(name):
                    score = done.get(candidate.name, leaf, task)
                    if score is None:
                        built = build_task(leaf, task, file, options.data, options.judge)
                        score = score_task(lm, leaf, task, built, options.limit)
                        done.add(candidate.name, leaf, task, score)
                    parts.append(score)
                scores[candidate.name][name] = score = mean_score(parts)
                error = "" if score.stderr is None else f" ± {score.stderr:.1f}"
                print(f"{candidate.name} on {name}: {score.score:.1f}{error} %, {score.documents:,} documents",
                      file=sys.stderr, flush=True)
                if score.truncated:
                    print(f"warning: {candidate.name} on {name}: {score.truncated:,} requests have lost the beginning "
                          f"of their context, since the model takes {lm.max_length:,} tokens", file=sys.stderr,
                          flush=True)
        del model
        free_memory()
    return SuiteResults(suite, scores, skipped, setup)
