"""``flexolmo mix`` from its arguments to its files, and the recipes that come with the package."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from flexolmo_megatron.cli import main
from flexolmo_megatron.mix.recipe import load_recipe, recipe_names
from flexolmo_megatron.mix.steps import WriteDocuments

RECIPE = """\
about: A test.
sources:
  pages:
    what: pages
    licence: CC0
    filters:
      - label: {key: meta.kind, keep: [news]}
      - regex: {regex_exp: casino}
  code:
    text_key: content
    filters: [{number: {key: stars, at_least: 2}}]
  books:
filters:
  - length: {at_least: 5}
"""


def page(text, kind):
    return json.dumps({"text": text, "meta": {"kind": kind}}) + "\n"


@pytest.fixture
def world(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "a.jsonl").write_text(page("a vote was held", "news") + page("the casino won", "news") + "{\n"
                                      + page("buy this now", "ads") + page("no", "news"))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(page("nothing of it", "ads"))
    pyarrow.parquet.write_table(pyarrow.table({
        "content": ["def f(): pass", None, "print(1)", "x"], "stars": pyarrow.array([3, 9, 1, None], pyarrow.int64()),
    }), tmp_path / "c.parquet")
    return tmp_path


def mix(folder, *words, out="out", status=0):
    given = [f"--source=pages={folder}/*.jsonl*", f"--source=code={folder}/c.parquet"]
    assert main(["mix", str(folder / "recipe.yaml"), *given, "--workers", "1", "--out", str(folder / out),
                 *words]) == status


def test_a_mix(world, capsys):
    mix(world)
    assert sorted(path.name for path in (world / "out").iterdir()) == [
        "code-000000.jsonl", "pages-000000.jsonl", "recipe.yaml", "report.json"]
    assert (world / "out" / "pages-000000.jsonl").read_text() == (
        '{"text": "a vote was held", "source": "pages/a.jsonl:1"}\n')
    assert (world / "out" / "code-000000.jsonl").read_text() == (
        '{"text": "def f(): pass", "source": "code/c.parquet:1"}\n')
    assert (world / "out" / "recipe.yaml").read_text() == RECIPE
    report = json.loads((world / "out" / "report.json").read_text())
    assert report["absent"] == ["books"]
    pages, code = report["sources"]["pages"], report["sources"]["code"]
    assert [(row["name"], row["kept"], row["dropped"], row["reasons"]) for row in pages["filters"]] == [
        ("label", 3, 2, {}), ("regex", 2, 1, {}), ("length", 1, 1, {"short": 1})]
    assert (pages["documents"], pages["unusable"], pages["written"], pages["text_bytes"], pages["licence"]) == (
        5, {"broken JSON": 1}, 1, 15, "CC0")
    assert [(row["name"], row["kept"], row["dropped"], row["reasons"]) for row in code["filters"]] == [
        ("number", 1, 2, {"missing": 1}), ("length", 1, 0, {})]
    assert code["licence"] == "not stated"
    printed = capsys.readouterr().out
    assert "pages: 5 documents, and 1 unusable\n" in printed
    assert "  length             kept            1   dropped            1   (short 1)\n" in printed
    assert printed.endswith("sources of the recipe that were not given: books\n")
    assert not (world / "out.state").exists()


def test_processes_and_a_stop_change_nothing(world, monkeypatch, capfd):
    mix(world, out="one")
    mix(world, "--workers", "2", out="two")
    assert "datatrove" not in capfd.readouterr().err  # what it reports on each task is in its logs
    run, written = WriteDocuments.run, []

    def stop_at_the_second(self, data, rank=0, world_size=1):
        written.append(rank)
        if written == [0, 1]:
            raise KeyboardInterrupt
        return run(self, data, rank, world_size)

    monkeypatch.setattr(WriteDocuments, "run", stop_at_the_second)
    mix(world, out="three", status=130)
    logs = world / "three.state" / "sources" / "pages" / "logs"
    assert "Processing done for rank=0" in (logs / "task_00000.log").read_text()
    mix(world, "--text-key", "content", out="three", status=2)
    assert "another choice of text_key has left: repeat that choice" in capfd.readouterr().err
    mix(world, "--max-bad", "3", out="three")
    assert written == [0, 1, 1, 0]  # the second file of pages again, then that of code
    for path in (world / "one").iterdir():
        assert path.read_bytes() == (world / "two" / path.name).read_bytes() == (
            world / "three" / path.name).read_bytes(), path.name


def test_a_source_may_be_named_like_a_file_of_the_state(world):
    (world / "recipe.yaml").write_text(RECIPE.replace("code:", "plan.json:"))
    assert main(["mix", str(world / "recipe.yaml"), f"--source=plan.json={world}/c.parquet", "--workers", "1", "--out",
                 str(world / "out")]) == 0
    assert "def f(): pass" in (world / "out" / "plan.json-000000.jsonl").read_text()


@pytest.mark.parametrize("words, message", [
    (["new"], "unknown recipe 'new' (did you mean 'news'?); expected a YAML file, or one of academic, code, "),
    (["news", "--source", "dclm_base=x", "--out", "y"], "--source dclm_base: recipe news has no such source (did you "
                                                        "mean 'dclm_baseline'?); it has dclm_baseline"),
    (["news", "--source", "x", "--out", "y"], "--source x: expected NAME=FILES, as in dclm_baseline='*.jsonl'"),
    (["news", "--source", "dclm_baseline=nowhere.jsonl", "--out", "y"], "nowhere.jsonl does not exist; expected "),
    (["news", "--out", "y"], "--source is missing: expected NAME=FILES"),
    (["--out", "y"], "RECIPE is missing: expected the name of a recipe, or a YAML file"),
    (["news", "--source", "dclm_baseline=x"], "--out is missing: expected a new folder"),
])
def test_bad_arguments(words, message, capsys):
    assert main(["mix", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flexolmo: {message}") and error.count("\n") == 1, error


@pytest.mark.parametrize("old, new, message", [
    ("about", "abuot", "unknown key 'abuot' (did you mean 'about'?)"),
    ("licence", "license", "source pages: unknown key 'license' (did you mean 'licence'?)"),
    ("[{number", "3\n#", "source code: filters = 3: expected a list"),
    ("  code:", "  co/de:", "source co/de: expected a name of letters, digits, '_', '-' and '.', as it begins the "),
    ("A test.", "${nothing}", "about: Interpolation key 'nothing' not found"),
    ("length", "lenght", "source pages: unknown filter 'lenght' (did you mean 'length'?)"),
])
def test_bad_recipes(world, old, new, message, capsys):
    (world / "recipe.yaml").write_text(RECIPE.replace(old, new))
    mix(world, status=2)
    assert f"recipe {world}/recipe.yaml: {message}" in capsys.readouterr().err


def test_too_many_unusable_documents(world, capsys):
    mix(world, "--max-bad", "0", status=2)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"flexolmo: 1 unusable document (1 broken JSON), first {world}/a.jsonl:3 (broken JSON): more than the 0 that "
        "--max-bad allows")
    mix(world, "--max-bad", "5")


def test_a_start_that_did_nothing_does_not_bind(world):
    mix(world, "--text-key", "txet", "--max-bad", "0", status=2)
    assert not (world / "out.state").exists()
    mix(world)


def test_recipes_of_the_package(capsys):
    names = ["academic", "code", "creative_writing", "educational", "math", "news", "public", "reddit"]
    assert recipe_names() == names
    for name in names:
        recipe = load_recipe(name)
        assert recipe.about != "not stated" and "FlexOlmo" in recipe.facts, name
    assert main(["mix"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
    assert main(["mix", "code"]) == 0
    assert capsys.readouterr().out == load_recipe("code").text


def test_news_and_public_share_no_page(tmp_path):
    kinds = ["news_article", "creative_writing", "faqs", "personal_blog", None]
    (tmp_path / "dclm.jsonl").write_text("".join(
        json.dumps({"text": f"page {kind}", "format": kind}) + "\n" for kind in kinds))
    for name, expected in (("news", ["page news_article"]), ("creative_writing", ["page creative_writing"]),
                           ("public", ["page faqs", "page personal_blog"])):
        assert main(["mix", name, f"--source=dclm_baseline={tmp_path}/dclm.jsonl", "--workers", "1", "--out",
                     str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "dclm_baseline-000000.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == expected


@pytest.mark.parametrize("filters, message", [
    ("label: {key: meta.kin, keep: [news]}", "none of 5 documents has a field 'meta.kin' that the filter label can"),
    ("number: {key: text}", "none of 5 documents has a field 'text' that the filter number can use: expected files "),
    ("url:", "none of 5 documents has a field 'url' that the filter url can use"),
])
def test_a_field_that_no_document_has(world, filters, message, capsys):
    (world / "recipe.yaml").write_text(RECIPE.replace("label: {key: meta.kind, keep: [news]}", filters))
    mix(world, status=2)
    assert f"flexolmo: --source pages: {message}" in capsys.readouterr().err
    (world / "recipe.yaml").write_text(RECIPE.replace("[news]", "[poems]"))
    mix(world)
    assert "warning: of the source pages, nothing was kept\n" in capsys.readouterr().err


def test_code(tmp_path):
    text = "\n".join(f"def function_{number}(argument): return {number}" for number in range(9))
    documents = [(text, 2), (text, 1), ("short", 9), ("0, " * 90 + text, 9)]
    (tmp_path / "code.jsonl").write_text("".join(
        json.dumps({"content": content, "max_stars_count": stars}) + "\n" for content, stars in documents))
    assert main(["mix", "code", f"--source=starcoder={tmp_path}/code.jsonl", "--workers", "1", "--out",
                 str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["dropped"] for row in report["sources"]["starcoder"]["filters"]] == [1, 1, 1]
    assert report["sources"]["starcoder"]["written"] == 1
