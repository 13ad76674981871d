"""Steps of a comparison: each has a folder of its own, and is skipped where that was completed from the same things.

The file ``step.json`` of a folder says what it was made from, and whether it is complete. Everything that a step writes
appears whole or not at all, so a step that was stopped goes on with what it finds.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import read_json, write_json

RECORD = "step.json"


@dataclass(frozen=True)
class Step:
    """One piece of work."""

    name: str
    """Its folder, below that of the comparison."""
    what: str
    """A few words."""
    work: Callable[[Path], None]
    """Does it, in its folder, which exists."""
    options: Mapping[str, Any]
    """What decides the result besides the inputs, as JSON values."""
    inputs: tuple[str, ...] = ()
    """Names of the steps whose results it reads."""
    tokens: int = 0
    """Training tokens."""
    flops: int = 0
    """Of training."""
    parallel: bool = False
    """All processes of a launch take part; otherwise the first one alone works."""
    renewed: bool = False
    """Done again where it was made from something else or a file of it is gone, in the same folder: it is quick, and
    loses nothing."""
    files: tuple[Path, ...] = ()
    """Files of the user that it reads: what is in them decides the result, too."""


@dataclass
class Plan:
    """All steps in an order in which they can be done, and where."""

    out: Path
    steps: dict[str, Step] = field(default_factory=dict)
    _contents: dict[str, dict[str, list[Any]] | None] = field(default_factory=dict)

    def add(self, step: Step) -> str:
        """Append a step whose inputs are there; returns its name."""
        assert step.name not in self.steps and all(name in self.steps for name in step.inputs), step
        self.steps[step.name] = step
        return step.name

    def digest(self, name: str) -> str:
        """sha256 of all that a step's result is made from."""
        step = self.steps[name]
        made_from: list[Any] = [step.options, [self.digest(other) for other in step.inputs]]
        if contents := self.contents(name):
            made_from.append([digest for _, digest in contents.values()])
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def contents(self, name: str) -> dict[str, list[Any]] | None:
        """Return of each of a step's files the time of its last change, in ns, and sha256.

        A file that has not changed since the step was recorded is not read again: corpora are large.

        Returns:
            None where a step has no files, or an earlier release, which looked at names and sizes alone, recorded it.
        """
        if name not in self._contents:
            files, record = self.steps[name].files, self.recorded(name)
            before = record.get("contents") if record else {}
            self._contents[name] = None if before is None or not files else {
                str(file): _content(file, before.get(str(file))) for file in files}
        return self._contents[name]

    def level(self, name: str) -> int:
        """Number of steps, one after the other, that must be done before."""
        return max((self.level(other) + 1 for other in self.steps[name].inputs), default=0)

    def recorded(self, name: str) -> dict[str, Any]:
        """Return the record of a step, empty where it has not begun."""
        path = self.out / name / RECORD
        return read_json(path, "the record of a step") if path.exists() else {}

    def is_done(self, name: str) -> bool:
        """Whether a step is complete.

        Raises:
            FlexOlmoError: its folder was made from something else.
        """
        found, step = self.recorded(name), self.steps[name]
        if not found:
            return False
        if found.get("digest") != self.digest(name):
            if step.renewed:
                return False
            difference = self._difference(step, found)
            raise FlexOlmoError(f"{self.out / name} was made {difference}: remove this folder to make it anew, or name "
                                "another folder as out")
        if not all((self.out / name / file).exists() for file in found.get("made") or ()):
            return False
        return found.get("seconds") is not None

    def _difference(self, step: Step, found: Mapping[str, Any]) -> str:
        before, now = found.get("options", {}), json.loads(json.dumps(step.options))
        for key in [*now, *before]:
            if now.get(key) != before.get(key):
                return f"with {key} = {before.get(key)}, which is {now.get(key)} now"
        for file, (_, digest) in (self.contents(step.name) or {}).items():
            if found["contents"].get(file, [None, None])[1] != digest:
                return f"from other text in {file}"
        return f"from another result of {', '.join(step.inputs)}"

    def record(self, name: str, seconds: float | None) -> None:
        """Write what a step is made from; ``seconds`` is None at its start, and what it took at its end."""
        step, made = self.steps[name], None
        if step.renewed and seconds is not None:
            made = sorted({path.name for path in (self.out / name).iterdir() if path.is_file()} - {RECORD})
        write_json(self.out / name / RECORD, {
            "what": step.what, "digest": self.digest(name), "options": step.options, "inputs": list(step.inputs),
            "contents": self.contents(name), "tokens": step.tokens, "flops": step.flops, "made": made,
            "seconds": seconds})


def _content(file: Path, before: list[Any] | None) -> list[Any]:
    modified = file.stat().st_mtime_ns
    if before and before[0] == modified:
        return before
    with open(file, "rb") as stream:
        return [modified, hashlib.file_digest(stream, "sha256").hexdigest()]


def choose(plan: Plan, only: Sequence[str]) -> list[str]:
    """Return the names of the steps to do: all, or those that ``only`` names.

    Raises:
        FlexOlmoError: there is no such step.
    """
    for name in only:
        if name not in plan.steps:
            raise FlexOlmoError(f"--only {name}: there is no such step; --dry-run lists them")
    return [name for name in plan.steps if not only or name in only]


def run_steps(plan: Plan, names: Sequence[str], report: Callable[[str], None]) -> None:
    """Do what is not done yet. Called by all processes of a launch, with torch.distributed ready.

    Args:
        plan: all steps.
        names: of those to do, in order.
        report: takes lines on progress.

    Raises:
        FlexOlmoError: what a step raises, or an input of a step is missing.
    """
    from flexolmo_megatron.runtime.ranks import on_first_rank

    done = on_first_rank(lambda: [name for name in plan.steps if plan.is_done(name)])
    for number, name in enumerate(names, 1):
        step = plan.steps[name]
        if name in done:
            continue
        for other in step.inputs:
            if other not in done:
                raise FlexOlmoError(f"{name} needs {other}, which is not done yet")
        folder = plan.out / name

        def begin(name: str = name, folder: Path = folder) -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FlexOlmoError(f"out = {plan.out}: {folder} cannot be made ({error.strerror}); expected a folder "
                                    "that can be written") from None
            plan.record(name, None)

        on_first_rank(begin)
        tokens = f", {step.tokens:,} tokens" if step.tokens else ""
        report(f"[{number}/{len(names)}] {name}: {step.what}{tokens}")
        began = time.monotonic()
        if step.parallel:
            step.work(folder)
        else:
            on_first_rank(lambda step=step, folder=folder: step.work(folder))
        on_first_rank(lambda name=name, began=began: plan.record(name, round(time.monotonic() - began, 2)))
        done.append(name)
