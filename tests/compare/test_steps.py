"""Steps: done once, gone on with after a stop, refused where they were made from something else."""

import json
import os
from pathlib import Path

import pytest

from flexolmo_megatron.compare.steps import Plan, Step, choose, run_steps
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.runtime.setup import initialize


class Workshop:
    """A plan of three steps that count how often they were done."""

    def __init__(self, out: Path, **options: int) -> None:
        self.done: list[str] = []
        self.fails = ""
        self.plan = Plan(out)
        for name, inputs in (("a", ()), ("b/c", ("a",)), ("d", ("a", "b/c"))):
            self.plan.add(Step(name, f"do {name}", self.work(name), {"size": options.get(name, 1)}, inputs, tokens=5,
                               renewed=name == "d"))

    def work(self, name: str):
        def do(folder: Path) -> None:
            assert folder.is_dir()
            if name == self.fails:
                raise FlexOlmoError(f"{name} cannot be done")
            self.done.append(name)

        return do

    def run(self, *only: str) -> list[str]:
        lines: list[str] = []
        run_steps(self.plan, choose(self.plan, only), lines.append)
        return lines


@pytest.fixture(autouse=True)
def process_groups() -> None:
    initialize()


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    first, second = Workshop(tmp_path), Workshop(tmp_path)
    assert first.run() == ["[1/3] a: do a, 5 tokens", "[2/3] b/c: do b/c, 5 tokens", "[3/3] d: do d, 5 tokens"]
    assert second.run() == [] and second.done == []


def test_goes_on_after_a_failure(tmp_path: Path) -> None:
    first, second = Workshop(tmp_path), Workshop(tmp_path)
    first.fails = "b/c"
    with pytest.raises(FlexOlmoError, match="b/c cannot be done"):
        first.run()
    second.run()
    assert (first.done, second.done) == (["a"], ["b/c", "d"])


def test_other_options_are_refused_also_for_an_unfinished_step(tmp_path: Path) -> None:
    first = Workshop(tmp_path)
    first.fails = "b/c"
    with pytest.raises(FlexOlmoError):
        first.run()
    with pytest.raises(FlexOlmoError, match=r"b/c was made with size = 1, which is 2 now: remove this folder"):
        Workshop(tmp_path, **{"b/c": 2}).run()


def test_a_result_of_other_inputs_is_refused(tmp_path: Path) -> None:
    Workshop(tmp_path).run()
    (tmp_path / "a" / "step.json").unlink()
    with pytest.raises(FlexOlmoError, match=r"b/c was made from another result of a: remove"):
        Workshop(tmp_path, a=2).run()


def reads(out: Path, file: Path) -> Plan:
    """A plan of one step that reads a file."""
    plan = Plan(out)
    plan.add(Step("a", "read", lambda folder: None, {"size": file.stat().st_size}, files=(file,)))
    return plan


def test_other_text_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text("one")
    run_steps(reads(tmp_path, file), ["a"], print)
    os.utime(file, ns=(0, 0))  # the same text, written again
    assert reads(tmp_path, file).is_done("a")
    file.write_text("two")
    with pytest.raises(FlexOlmoError, match=rf"a was made from other text in {file}: remove this folder"):
        reads(tmp_path, file).is_done("a")


def test_records_of_earlier_releases_which_say_nothing_of_the_text_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text("one")
    plan = Plan(tmp_path)
    plan.add(Step("a", "read", lambda folder: None, {"size": 3}))
    run_steps(plan, ["a"], print)
    record = json.loads((tmp_path / "a" / "step.json").read_text())
    del record["contents"]
    (tmp_path / "a" / "step.json").write_text(json.dumps(record))
    assert reads(tmp_path, file).is_done("a")


def test_reports_are_made_anew(tmp_path: Path) -> None:
    Workshop(tmp_path).run()
    again = Workshop(tmp_path, d=2)
    again.run()
    assert again.done == ["d"]


def test_single_steps_need_their_inputs(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    with pytest.raises(FlexOlmoError, match="b/c needs a, which is not done yet"):
        workshop.run("b/c")
    workshop.run("a")
    workshop.run("b/c")
    assert workshop.done == ["a", "b/c"]
    with pytest.raises(FlexOlmoError, match="--only e: there is no such step"):
        workshop.run("e")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexOlmoError, match=rf"out = {tmp_path}/file: {tmp_path}/file/a cannot be made \(Not a direct"):
        Workshop(tmp_path / "file").run()


def test_levels_are_the_longest_ways(tmp_path: Path) -> None:
    plan = Workshop(tmp_path).plan
    assert [plan.level(name) for name in plan.steps] == [0, 1, 2]
