"""The suite on tiny local data sets: what it computes, skips, keeps, and refuses."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest

from flexolmo_megatron.cli import main
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.candidates import Candidate
from flexolmo_megatron.evaluation.suites.judge import Judge
from flexolmo_megatron.evaluation.suites.load import PAPER, SuiteTask, load_suite
from flexolmo_megatron.evaluation.suites.results import SuiteResults, TaskScore, mean_score
from flexolmo_megatron.evaluation.suites.run import SuiteOptions, chosen_tasks, run_suite
from flexolmo_megatron.inference.model import load_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed")


def write(folder, name: str, **splits: list[dict]) -> None:
    (folder / name).mkdir(parents=True)
    for split, rows in splits.items():
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arc(index: int) -> dict:
    return {"question": f"What is {index}?", "answerKey": "ABCD"[index % 4],
            "choices": {"text": [str(index + other) for other in range(4)], "label": list("ABCD")}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every task's data set in the columns of its original, a few rows of each."""
    folder = tmp_path_factory.mktemp("data")
    write(folder, "arc_easy", train=[arc(index) for index in range(5)], test=[arc(index) for index in range(5, 11)])
    squad = [{"title": "T", "context": f"He is {name}.", "question": "Who is he?", "answers": {"text": [name]}}
             for name in ("Bob", "Tim", "Tom", "Jim", "Ben", "Sam")]
    write(folder, "squad", train=squad[:5], validation=squad[5:])
    write(folder, "mbpp", test=[{"text": "Add one.", "code": "def f(x): return x + 1",
                                 "test_list": ["assert f(1) == 2"]}])
    problems = [{"problem": f"1 + {index}?", "solution": f"\\boxed{{{index + 1}}}"} for index in range(5)]
    for name in ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                 "prealgebra", "precalculus"):
        write(folder, f"math_{name}", train=problems[:4], test=problems[4:])
    write(folder, "gsm8k/gsm8k-cot", test=[{"question": "1 + 1?", "answer": "It is so. #### 2"}])
    return folder


def test_the_paper_has_31_tasks():
    suite = load_suite()
    assert list(suite.groups) == ["MC9", "GEN5", "MMLU", "MMLU-Pro", "AGIEval", "BBH", "Math2", "NewsG", "PoemG",
                                  "SciRIFF5", "Code4"]
    assert [len(tasks) for tasks in suite.groups.values()] == [9, 5, 1, 1, 1, 1, 2, 1, 1, 5, 4]
    assert len(chosen_tasks(suite, [])) == 31
    assert len(suite.leaves("mmlu")) == 57 and len(suite.leaves("bbh")) == 27 and len(suite.leaves("agieval")) == 8
    for name in chosen_tasks(suite, []):
        assert suite.tasks[name].verified and suite.tasks[name].differs, "every task says what is known of it"
        for leaf, _, file in suite.leaves(name):
            assert file is None or file.is_file(), leaf


def test_multiple_choice_follows_the_likelihood_of_the_letters(models, data, tmp_path):
    options = SuiteOptions(["arc_easy"], data=data, limit=4)
    candidates = [Candidate("m", models["merged"]), Candidate("x", models["export"]),
                  Candidate("none", models["merged"], only=("public",))]
    results = run_suite(load_suite(), candidates, tmp_path / "out", options)
    assert results.scores["m"] == results.scores["x"], "the export is the same model"
    model = load_model(models["merged"])
    shots = "".join(f"{question(arc(index))} {arc(index)['answerKey']}\n\n" for index in range(5))
    for name, experts in (("m", None), ("none", ["public"])):
        right = 0
        for index in range(5, 9):
            tokens = list((shots + question(arc(index)) + " ").encode())
            logits = model.logits([model.tokenizer.encode(bytes(tokens).decode())], experts)[0, -1]
            letters = [model.tokenizer.encode(letter)[0] for letter in "ABCD"]
            right += "ABCD"[logits[letters].argmax()] == arc(index)["answerKey"]
        assert results.scores[name]["arc_easy"].score == pytest.approx(25 * right)
        assert results.scores[name]["arc_easy"].documents == 4


def question(row: dict) -> str:
    choices = "".join(f" {label}. {text}\n" for label, text in zip("ABCD", row["choices"]["text"], strict=True))
    return f"Question: {row['question']}\n{choices}Answer:"


def test_the_command(models, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "suite"
    command = ["suite", "--model", f"m={models['merged']}", "--data", str(data), "--limit", "1", "--out", str(out),
               "--tasks", "arc_easy", "squad", "NewsG", "mbpp"]
    done = subprocess.run([sys.executable, "-m", "flexolmo_megatron.cli", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["m on arc_easy", "m on squad"], "no noise"
    results = json.loads((out / "results.json").read_text())
    assert set(results["tasks"]["m"]) == {"arc_easy", "squad"} and results["average"] == {"m": None}
    assert results["groups"] == {"m": {}}, "no group is whole"
    assert results["skipped"] == {"news_generation": "no --judge-url was given",
                                  "mbpp": "it runs programs that the model writes, which --run-code allows"}
    assert "first five documents" in results["notes"]["arc_easy"]["differs"]
    assert "| arc_easy |" in (out / "results.md").read_text()

    from flexolmo_megatron.evaluation.suites import run

    monkeypatch.setattr(run, "score_task", lambda *_: pytest.fail("it was computed already"))
    assert main(command) == 0
    changed = tmp_path / "changed.yaml"
    changed.write_text(PAPER.read_text().replace("max_gen_toks: 50", "max_gen_toks: 51"))
    computed = []
    monkeypatch.setattr(run, "score_task", lambda _, name, *__: computed.append(name) or TaskScore(0.0, None, 1))
    assert main([*command, "--suite", str(changed)]) == 0
    assert computed == ["squad"], "a score belongs to the task as it was"
    assert main([*command, "--seed", "1"]) == 2
    assert "holds a run with seed = 0, and this one has 1: name a new directory" in capsys.readouterr().err


def test_standard_errors_and_data_that_has_changed(models, data, tmp_path, capsys):
    data = shutil.copytree(data, tmp_path / "data")
    command = ["suite", "--model", f"m={models['merged']}", "--data", str(data), "--tasks", "arc_easy", "--out",
               str(tmp_path / "suite")]
    assert main(command) == 0
    found = json.loads((tmp_path / "suite" / "results.json").read_text())["tasks"]["m"]["arc_easy"]
    share, count = found["score"] / 100, found["documents"]
    assert found["stderr"] == pytest.approx(100 * math.sqrt(share * (1 - share) / (count - 1)))
    file = next((data / "arc_easy").glob("test.*"))
    file.write_text("\n".join(file.read_text().splitlines()[:3]) + "\n")
    assert main(command) == 0
    again = json.loads((tmp_path / "suite" / "results.json").read_text())["tasks"]["m"]["arc_easy"]
    assert (found["documents"], again["documents"]) == (6, 3)
    assert main([*command, "--model", f"m={models['export']}"]) == 2
    assert "--model 'm' is given 2 times: expected a different name for each" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main([*command[:-1], str(tmp_path / "file")]) == 2
    assert "file already exists and holds no run of a suite" in capsys.readouterr().err


def test_contexts_that_are_too_long_are_counted(models, data, tmp_path, capsys):
    data = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(data / "arc_easy")
    rows = [arc(index) | {"question": 250 * "why "} for index in range(6)]
    write(data, "arc_easy", train=rows, test=[arc(0) | {"question": "?"}, rows[1], rows[2]])
    command = ["suite", "--model", f"m={models['merged']}", "--data", str(data), "--tasks", "arc_easy", "squad",
               "--out", str(tmp_path / "out")]
    for _ in range(2):  # computed, then kept
        assert main(command) == 0
        assert capsys.readouterr().err.count("warning: m on arc_easy: 12 requests have lost the beginning of their "
                                             "context, since the model takes 1,024 tokens\n") == 1
        tasks = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["m"]
        assert {name: score["truncated"] for name, score in tasks.items()} == {"arc_easy": 3 * 4, "squad": 0}
        assert "too long for the model: 12 requests of arc_easy to m." in (tmp_path / "out" / "results.md").read_text()


def test_tasks_may_be_named_in_any_case():
    suite = load_suite()
    suite.tasks["MyTask"] = suite.tasks["mytask"] = suite.tasks["arc_easy"]
    suite.groups["Mine"] = ["MyTask", "mytask"]
    assert chosen_tasks(suite, ["MyTask"]) == ["MyTask"] and chosen_tasks(suite, ["mytask"]) == ["mytask"]
    assert chosen_tasks(suite, ["mine"]) == ["MyTask", "mytask"] and chosen_tasks(suite, ["ARC_easy"]) == ["arc_easy"]


def test_means_of_parts_and_code(models, data, tmp_path):
    options = SuiteOptions(["mbpp", "Math2"], data=data, run_code=True)
    suite = load_suite()
    for task in ("gsm8k", "minerva_math", "mbpp"):  # fewer new tokens than in earnest
        for _, leaf, _ in suite.leaves(task):
            settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
            if leaf.config is not None:
                leaf.config["generation_kwargs"] = settings
            else:
                leaf.overrides["generation_kwargs"] = settings
    results = run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "out", options)
    assert results.scores["m"]["minerva_math"].documents == 7
    assert results.groups("m")["Math2"].score == mean_score(list(results.scores["m"].values())[:2]).score
    assert {name: score.score for name, score in results.scores["m"].items()} == {
        "gsm8k": 0, "minerva_math": 0, "mbpp": 0}, "a random model can do nothing"


class SomeJudge(Judge):
    """Half of all points, and remembers what it was asked."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []

    def ask(self, prompt):
        if self.model == "dead":
            raise FlexOlmoError("the judge gave no answer")

    def score(self, kind, reference, generated, about=""):
        self.asked.append((kind, reference, list(generated)))
        return [0.25 if index % 2 else 0.75 for index in range(len(generated))]


def test_a_judge_may_come_later(models, data, tmp_path):
    def start(judge: str | None, *tasks: str) -> dict:
        options = SuiteOptions(tasks, limit=1, data=data, judge=judge and SomeJudge("http://nowhere", judge))
        results = run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "out", options)
        return results.scores["m"]

    data = shutil.copytree(data, tmp_path / "data")
    articles = [{"text": " ".join(f"{name}{index}" for index in range(36))} for name in "abcdef"]
    write(data, "news_generation", retain1=articles[:5], forget=articles[5:])
    suite = load_suite()
    suite.tasks["news_generation"].config["generation_kwargs"] |= {"max_gen_toks": 6}
    assert set(start(None, "arc_easy", "NewsG")) == {"arc_easy"}
    assert set(start("some", "arc_easy", "NewsG")) == {"arc_easy", "news_generation"}
    assert set(start(None, "arc_easy", "NewsG")) == {"arc_easy"}
    with pytest.raises(FlexOlmoError, match="holds a run with judge = some, and this one has other"):
        start("other", "arc_easy", "NewsG")
    with pytest.raises(FlexOlmoError, match="the judge gave no answer"):
        run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "dead", SuiteOptions(
            ["arc_easy", "NewsG"], data=data, judge=SomeJudge("http://nowhere", "dead")))
    assert not (tmp_path / "dead").exists()


def test_judged_tasks_and_papers(models, data, tmp_path):
    articles = [{"text": " ".join(f"{name}{index}" for index in range(36))} for name in "abcdefg"]
    write(data, "news_generation", retain1=articles[:5], forget=articles[5:])
    papers = [{"input": f"Do.\n\nQuestion: is {index}?\n\nContext: it is.", "output": "yes"} for index in range(6)]
    write(data, "sciriff_bioasq_yesno_qa", train=papers[:5], test=papers[5:])
    write(data, "sciriff_bioasq_factoid_qa", train=papers[:5], test=papers[5:])
    suite = load_suite()
    for task in ("news_generation", "sciriff_bioasq_factoid_qa"):
        suite.tasks[task].config["generation_kwargs"] |= {"max_gen_toks": 6}
    judge = SomeJudge("http://nowhere", "some")
    results = run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "out", SuiteOptions(
        ["NewsG", "sciriff_bioasq_yesno_qa", "sciriff_bioasq_factoid_qa"], data=data, judge=judge))
    scores = results.scores["m"]
    assert scores["news_generation"].score == pytest.approx(100 * (3 * 0.75 + 2 * 0.25) / 5)
    assert results.groups("m") == {"NewsG": scores["news_generation"]}
    assert [(kind, reference) for kind, reference, _ in judge.asked] == [
        ("news article", article["text"]) for article in articles[5:]]
    for (_, reference, generated) in judge.asked:
        assert len(set(generated)) == 5 and all(text.startswith(reference[:20]) for text in generated)
    assert scores["sciriff_bioasq_yesno_qa"].score in (0, 100) and 0 <= scores["sciriff_bioasq_factoid_qa"].score <= 100


def test_averages_by_hand():
    suite = load_suite()
    scores = {task: TaskScore(float(index), 1.0, 10) for index, task in enumerate(chosen_tasks(suite, []))}
    results = SuiteResults(suite, {"m": scores})
    groups = results.groups("m")
    assert groups["MC9"].score == pytest.approx(4) and groups["MC9"].stderr == pytest.approx(1 / 3)
    assert groups["Math2"].score == pytest.approx((18 + 19) / 2)
    assert results.average("m") == pytest.approx(sum(group.score for group in groups.values()) / 11)
    assert results.to_markdown().splitlines()[0] == (
        "| model | MC9 | GEN5 | MMLU | MMLU-Pro | AGIEval | BBH | Math2 | NewsG | PoemG | SciRIFF5 | Code4 | Avg. |")


def test_what_is_refused(models, data, tmp_path, monkeypatch):
    suite = load_suite()
    message = "--tasks arc_eazy: the suite has no such group or task (did you mean 'arc_easy'?): expected some of MC9"
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        chosen_tasks(suite, ["arc_eazy"])
    with pytest.raises(FlexOlmoError, match="nothing to run: news_generation: no --judge-url was given"):
        run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "a", SuiteOptions(["NewsG"]))
    with pytest.raises(FlexOlmoError, match="--data .*nowhere is no folder: expected one of local data sets"):
        run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "a", SuiteOptions(data=tmp_path / "nowhere"))
    assert not (tmp_path / "a").exists()
    with pytest.raises(FlexOlmoError, match="--limit 0: expected at least 1"):
        SuiteOptions(limit=0)
    (data / "boolq").mkdir()
    with pytest.raises(FlexOlmoError, match="boolq holds no data: expected a file for each split, such as test.jsonl"):
        run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "b", SuiteOptions(["boolq"], data=data))
    write(data, "csqa", train=[{"other": 1}], validation=[{"other": 1}])
    with pytest.raises(FlexOlmoError, match="task csqa: its data tau/commonsense_qa cannot be used"):
        run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "c", SuiteOptions(["csqa"], data=data))
    monkeypatch.setitem(sys.modules, "transformers.data.metrics", None)  # as in transformers 5
    suite.tasks["coqa"] = SuiteTask("coqa", "f1", parts=("harness/coqa/default.yaml",))
    with pytest.raises(FlexOlmoError, match="task coqa/default: .* needs a package that is not installed, or another"):
        run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "d", SuiteOptions(["coqa"]))


def cut(name: str, split: str, rows: int):
    """Leave a split of a task with its first rows alone."""
    def change(data):
        file = data / name / f"{split}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:rows]))
    return change


def answer(split: str, key: str):
    """Give the last row of arc_easy another answer."""
    def change(data):
        file = data / "arc_easy" / f"{split}.jsonl"
        *rows, last = map(json.loads, file.read_text().splitlines())
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, last | {"answerKey": key}]))
    return change


def winogrande(data):
    row = {"sentence": "_ a", "option1": "x", "option2": "y"}
    write(data, "winogrande", train=[row | {"answer": "1"}] * 5, validation=[row | {"answer": key} for key in "13"])


@pytest.mark.parametrize(("tasks", "change", "message"), [
    ("arc_easy", answer("test", "Z"), "task arc_easy: document 6 of its test split does not fit (ValueError: 'Z' is "
                                      "not in list): expected documents in the form of allenai/ai2_arc"),
    ("arc_easy", answer("train", "Z"), "task arc_easy: document 5 of its train split does not fit (ValueError: 'Z'"),
    ("arc_easy", answer("train", None), "task arc_easy: document 5 of its train split does not fit (ValueError: None"),
    ("arc_easy winogrande", winogrande, "task winogrande: document 2 of its validation split does not fit (ValueError: "
                                        "the answer 2 is none of 2 choices)"),
    ("arc_easy", cut("arc_easy", "train", 2), "task arc_easy: its train split has 2 documents: expected at least 5, "
                                              "since 5 come before each question"),
    ("arc_easy", lambda data: (data / "arc_easy" / "train.jsonl").unlink(),
     "arc_easy/train.jsonl is missing (there are splits test): expected a file for each split that the task uses"),
    ("arc_easy math_algebra", None, "m on math_algebra: a task asks for 1024 new tokens, the model takes sequences of"),
])
def test_unusable_tasks_are_found_before_the_first_is_scored(models, data, tmp_path, capsys, monkeypatch, tasks, change,
                                                             message):
    from flexolmo_megatron.evaluation.suites import run

    monkeypatch.setattr(run, "score_task", lambda *_: pytest.fail("a task was scored"))
    suite = tmp_path / "suite.yaml"  # in which math_algebra may be chosen
    suite.write_text(PAPER.read_text().replace("Math2: [", "Math2: [math_algebra, "))
    if change:
        data = shutil.copytree(data, tmp_path / "data")
        change(data)
    assert main(["suite", "--model", f"m={models['merged']}", "--data", str(data), "--suite", str(suite), "--tasks",
                 *tasks.split(), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_shots_that_are_drawn_at_random_and_do_not_fit(models, data, tmp_path):
    data = shutil.copytree(data, tmp_path / "data")
    (data / "arc_easy" / "train.jsonl").write_text("".join(
        json.dumps(arc(index) | {"answerKey": "ABCD"[index % 4] if index < 5 else "Z"}) + "\n" for index in range(40)))
    suite = load_suite()
    suite.tasks["arc_easy"].config["fewshot_config"] = {"sampler": "default"}
    with pytest.raises(FlexOlmoError, match=re.escape("task arc_easy: its prompts cannot be made (ValueError: 'Z' is")):
        run_suite(suite, [Candidate("m", models["merged"])], tmp_path / "out", SuiteOptions(["arc_easy"], data=data))


@pytest.mark.parametrize(("old", "new", "message"), [
    ("[mmlu]", "[mnlu]", "names the task 'mnlu', which it does not define (did you mean 'mmlu'?)"),
    ("process_docs: squad", "process_docs: squat", "task 'squad' has process_docs = 'squat' (did you mean 'squad'?)"),
    ("groups:", "gruops:", "cannot be read as a suite of tasks"),
    ("process_docs: squad", "process_docs: [squad]", "process_docs = ['squad'] (did you mean 'squad'?)"),
    ("name: FlexOlmo", "name: \udcff", "cannot be read as a suite of tasks: 'utf-8' codec can't decode byte 0xff"),
    ("[math_algebra,", "[minerva_math,", "task 'minerva_math' is a part of itself"),
    ("config: {<<: *arc, dataset_name: ARC-Challenge}", "config: 3", "'arc_challenge' needs either a config, which "),
])
def test_suite_files_with_mistakes(tmp_path, old, new, message):
    path = tmp_path / "suite.yaml"
    path.write_bytes(PAPER.read_text().replace(old, new, 1).encode("utf-8", "surrogateescape"))
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        load_suite(path)
