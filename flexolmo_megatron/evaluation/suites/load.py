"""A suite of tasks, read from YAML, and its tasks as lm-evaluation-harness wants them."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flexolmo_megatron.errors import FlexOlmoError, first_line, nearest
from flexolmo_megatron.evaluation.suites.functions import DOCS, JUDGED, RESULTS, judged
from flexolmo_megatron.evaluation.suites.judge import Judge
from flexolmo_megatron.training.documents import is_parquet, read_records

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

PAPER = Path(__file__).parent / "paper.yaml"
INSTALL = "task suites need lm-evaluation-harness; install it with: pip install 'flexolmo-megatron[tasks]'"
_SPLITS = ("train", "validation", "test", "dev", "forget", "retain1")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class SuiteTask:
    """One number of the suite."""

    name: str
    metric: str
    """Name of the number among those that the harness computes."""
    parts: tuple[str, ...] = ()
    """Of a mean over tasks: names of this suite's, or "harness/" and a pattern of files of the harness's."""
    config: Mapping[str, Any] | None = None
    """Of a single task: its configuration, in the harness's form."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """What to change in the configuration of the harness's tasks."""
    filter: str | None = None
    """Which of the harness's ways to read an answer counts; None for the first."""
    limit: int | None = None
    """Documents of the task, at most, whatever the run allows."""
    verified: str = ""
    """What the published evaluation is known to do, and this one does."""
    differs: str = ""
    """Where this one differs, or what is not known."""

    @property
    def needs(self) -> str | None:
        """What the task cannot run without: "judge", "code" or nothing special."""
        given = (self.config or {}).get("process_results")
        return given if given in (JUDGED, "code") else None


@dataclass(frozen=True)
class Suite:
    """Groups of tasks, whose means are the columns of the table."""

    name: str
    groups: dict[str, list[str]]
    tasks: dict[str, SuiteTask]

    def leaves(self, name: str) -> list[tuple[str, SuiteTask, Path | None]]:
        """The single tasks that ``name`` is the mean of: name, task of the suite, and file of the harness or None.

        Raises:
            FlexOlmoError: a part that does not exist.
        """
        task = self.tasks[name]
        if task.config is not None:
            return [(name, task, None)]
        found: list[tuple[str, SuiteTask, Path | None]] = []
        for part in task.parts:
            kind, slash, pattern = part.partition("/")
            if not slash:
                found += self.leaves(part)
                continue
            folder = harness_tasks()
            files = sorted(folder.glob(pattern)) if kind == "harness" and ".." not in pattern else []
            if not files:
                raise FlexOlmoError(f"task {name!r} has the part {part!r}: expected one of the suite's tasks, or "
                                    f"harness/ and a file below {folder}")
            found += [(f"{name}/{file.stem}", task, file) for file in files]
        return found


def harness_tasks() -> Path:
    """Folder of the harness's own tasks.

    Raises:
        FlexOlmoError: the harness is not installed.
    """
    try:
        import lm_eval
    except ImportError:
        raise FlexOlmoError(INSTALL) from None
    return Path(lm_eval.__file__).parent / "tasks"


def load_suite(path: Path = PAPER) -> Suite:
    """Read a suite.

    Raises:
        FlexOlmoError: the file cannot be read, or is not of the form that ``paper.yaml`` shows.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        tasks = {name: SuiteTask(name, **{**entry, "parts": tuple(entry.get("parts", ()))})
                 for name, entry in value["tasks"].items()}
        suite = Suite(value["name"], {group: list(names) for group, names in value["groups"].items()}, tasks)
    except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise FlexOlmoError(f"{path} cannot be read as a suite of tasks: {first_line(error)}") from error
    for names in [*suite.groups.values(), *(task.parts for task in tasks.values())]:
        for name in names:
            if "/" not in name and name not in tasks:
                raise FlexOlmoError(f"{path} names the task {name!r}, which it does not define{nearest(name, tasks)}")
    for task in tasks.values():
        if (task.config is None) == (not task.parts) or not isinstance(task.config, dict | None):
            raise FlexOlmoError(f"{path}: task {task.name!r} needs either a config, which is a mapping, or parts")
        for key, known in (("process_docs", [*DOCS]), ("process_results", [*RESULTS, JUDGED])):
            if (given := (task.config or {}).get(key)) is not None and given not in known:
                raise FlexOlmoError(f"{path}: task {task.name!r} has {key} = {given!r}{nearest(str(given), known)}: "
                                    f"expected one of {', '.join(known)}")
    try:
        TopologicalSorter({task.name: [part for part in task.parts if "/" not in part]
                           for task in tasks.values()}).prepare()
    except CycleError as error:
        raise FlexOlmoError(f"{path}: task {error.args[1][0]!r} is a part of itself") from None
    return suite


class _Splits(dict):
    """The splits of a task's folder; one that is not there is named as the file that was expected."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, split: str) -> None:
        raise FlexOlmoError(f"{self.folder / split}.jsonl is missing (there are splits {', '.join(self)}): expected a "
                            "file for each split that the task uses")


def _local_data(name: str, folder: Path | None) -> Callable[..., dict] | None:
    """What reads the splits of task ``name`` from ``folder``/``name``, if that exists."""
    if folder is None or not (folder / name).is_dir():
        return None
    files = {split: path for split in _SPLITS for suffix in _SUFFIXES
             if (path := folder / name / f"{split}{suffix}").exists()}
    if not files:
        raise FlexOlmoError(f"{folder / name} holds no data: expected a file for each split, such as test.jsonl")

    def read(**_: Any) -> dict:
        import json

        import datasets

        splits = _Splits(folder / name)
        for split, path in files.items():
            try:
                if is_parquet(path):
                    splits[split] = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
                else:
                    splits[split] = datasets.Dataset.from_list([json.loads(line) for _, line in read_records(path, "")])
            except FlexOlmoError:
                raise
            except (OSError, ValueError) as error:
                raise FlexOlmoError(f"{path} cannot be read: {first_line(error)}") from error
        return splits
    return read


def build_task(name: str, task: SuiteTask, file: Path | None, data: Path | None,
               judge: Judge | None) -> "ConfigurableTask":
    """Make the harness's object of one of ``Suite.leaves``; loads its data set.

    Args:
        name: of the leaf.
        task: of the suite.
        file: of the harness, or None for a task of the suite's own.
        data: folder with local data sets, one folder of JSONL or Parquet files per task; those without are loaded by
            name, from the network or the cache of Hugging Face.
        judge: for the tasks that need one.

    Raises:
        FlexOlmoError: the data set cannot be loaded, or does not fit the task; a package that it needs is missing.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    if file is not None:
        try:
            given = load_yaml(file)
        except ImportError as error:  # of the Python beside the harness's file
            raise FlexOlmoError(f"task {name}: {file} needs a package that is not installed, or another version of it "
                                f"({first_line(error)}); --tasks chooses others") from error
        config = {key: value for key, value in given.items() if key not in ("tag", "group", "task_list")}
        config.update(task.overrides)
    else:
        config = dict(task.config or {})
        if docs := config.get("process_docs"):
            convert = DOCS[docs]
            config["process_docs"] = lambda rows: datasets.Dataset.from_list(convert(rows))
        if results := config.get("process_results"):
            config["process_results"] = judged(judge) if results == JUDGED and judge else RESULTS[results]
    config["task"] = name
    if read := _local_data(name, data):
        config["custom_dataset"] = read

    class Task(ConfigurableTask):
        def build_all_requests(self, **options: Any) -> None:
            try:
                super().build_all_requests(**options)
            except Exception as error:  # whatever a template raises on a document; the model has no part in it
                raise _misfit(self, "its prompts cannot be made", error) from error

    try:
        built = Task(config=config)
        built.set_fewshot_seed(1234)  # as lm_eval's command line does
        return built
    except FlexOlmoError:
        raise
    except Exception as error:  # whatever datasets and jinja raise
        where = "" if data is None else f"{data / name} or "
        raise FlexOlmoError(f"task {name}: its data {config.get('dataset_path')} cannot be used ({first_line(error)}): "
                            f"expected it in {where}at Hugging Face; --data names a folder of local copies") from error


def _misfit(built: "ConfigurableTask", what: str, error: Exception) -> FlexOlmoError:
    return FlexOlmoError(f"task {built.config.task}: {what} ({type(error).__name__}: {first_line(error)}): expected "
                         f"documents in the form of {built.config.dataset_path}")


def check_documents(built: "ConfigurableTask", limit: int | None) -> None:
    """Find in a task's data, without a model, what would stop it half-way or be counted as a wrong answer.

    Of shots that are drawn at random only the first are looked at: most of a large split is never drawn.

    Args:
        built: see ``build_task``.
        limit: documents that are asked, at most; None for all.

    Raises:
        FlexOlmoError: there are too few documents for the shots, the task's templates do not fit a document, or a
            document's answer is none of its choices.
    """
    config, shot = built.config, built.fewshot_cfg
    asked = config.test_split or config.validation_split
    one_answer = config.output_type == "multiple_choice" and not built.multiple_input

    def check(split: str, docs: Iterable[dict], form: Any) -> None:
        for number, doc in enumerate(docs, 1):
            try:
                built.doc_to_text(doc, form.doc_to_text)
                target = built.doc_to_target(doc, form.doc_to_target)
                if one_answer and isinstance(target, int | str):
                    choices = built.doc_to_choice(doc, form.doc_to_choice)
                    if target not in (range(len(choices)) if isinstance(target, int) else choices):
                        raise ValueError(f"the answer {target!r} is none of {len(choices)} choices")
            except Exception as error:  # as in build_all_requests
                raise _misfit(built, f"document {number} of its {split} split does not fit", error) from error

    if shots := config.num_fewshot:
        needed = shots + (shot.split == config.test_split)  # then the harness leaves out the document that is asked
        if (there := len(built.sampler.df)) < needed:
            raise FlexOlmoError(f"task {config.task}: its {shot.split or asked} split has {there} documents: expected "
                                f"at least {needed}, since {shots} come before each question")
        check(shot.split or asked, built.sampler.df[:needed], shot)
    check(asked, itertools.islice(built.task_docs, limit), config)
