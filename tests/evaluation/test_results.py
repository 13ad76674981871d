"""The table of results in each of its formats."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.perplexity import DomainScore
from flexolmo_megatron.evaluation.report import write_report
from flexolmo_megatron.evaluation.results import Results
from flexolmo_megatron.evaluation.routing import RoutingShare
from flexolmo_megatron.files import check_free

SCORES = {
    "public": {"news": DomainScore(800.0, 400, 300, 4, 0.25), "math|1": DomainScore(300.0, 100, 100, 1, None)},
    "merged": {"news": DomainScore(820.0, 400, 300, 4, 0.125), "math|1": DomainScore(150.0, 100, 100, 1, None)},
}
SHARE = RoutingShare(["public", "math"], [[0.75, 0.25]], [[1.0, 0.0]])


@pytest.fixture
def results() -> Results:
    return Results(SCORES, "public", {"merged": {"news": SHARE, "math|1": SHARE}}, {"max_bytes": 400})


def test_json(results: Results) -> None:
    values = json.loads(json.dumps(results.to_json(), allow_nan=False))
    assert values["bits_per_byte"] == {"public": {"news": 2.0, "math|1": 3.0}, "merged": {"news": 2.05, "math|1": 1.5}}
    assert values["standard_error"]["merged"] == {"news": 0.125, "math|1": None}
    assert values["documents"]["public"] == {"news": 4, "math|1": 1}
    assert values["text_bytes"]["public"]["news"] == 400
    assert values["tokens"]["public"]["news"] == 300
    assert values["reference"] == "public"
    assert values["setup"] == {"max_bytes": 400}
    assert values["routing_share"]["merged"]["news"] == {
        "experts": ["public", "math"], "weight": [[0.75, 0.25]], "first_choice": [[1.0, 0.0]]}


def test_csv(results: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(results.to_csv())))
    assert len(rows) == 4
    assert rows[0] == {"model": "public", "domain": "news", "bits_per_byte": "2.0", "standard_error": "0.25",
                       "change_percent": "", "documents": "4", "text_bytes": "400", "tokens": "300"}
    assert (rows[3]["model"], rows[3]["domain"], rows[3]["standard_error"]) == ("merged", "math|1", "")
    assert float(rows[3]["change_percent"]) == -50


def test_markdown(results: Results) -> None:
    assert results.to_markdown() == (
        "| model | news | math\\|1 |\n"
        "|---|---:|---:|\n"
        "| public | **2.0000** | 3.0000 |\n"
        "| merged | 2.0500 (+2.5 %) | **1.5000 (-50.0 %)** |\n"
        "\n"
        "Bits per byte, lower is better; the best of each column in bold; % is the change from public.\n")
    assert "**1.5000** |" in Results(SCORES).to_markdown()


def test_terminal(results: Results) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(results.to_rich())
    lines = console.file.getvalue().splitlines()
    assert "│ public │ * 2.0000 │   3.0000 │" in lines
    row = lines.index("│ merged │   2.0500 │ * 1.5000 │")
    assert lines[row + 1] == "│        │   +2.5 % │  -50.0 % │"
    assert "change from public" in console.file.getvalue()


def test_names_are_not_taken_for_markup() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(Results({"[red]x[/blue]": SCORES["public"]}).to_rich())
    assert "[red]x[/blue]" in console.file.getvalue()


def test_unknown_reference() -> None:
    with pytest.raises(FlexOlmoError) as error:
        Results(SCORES, "publik")
    assert str(error.value) == ("--reference 'publik' is none of the models (did you mean 'public'?): expected one of "
                                "public, merged")


def test_report(results: Results, tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    files = write_report(results, tmp_path / "new")
    assert [path.name for path in files] == ["bits_per_byte.png", "results.csv", "results.json", "results.md",
                                             "routing_share.png"]
    assert all(path.stat().st_size for path in files)
    for taken in (tmp_path / "new", files[0]):
        with pytest.raises(FlexOlmoError, match="already exists; name a new directory"):
            check_free(taken)
    with pytest.raises(FlexOlmoError, match="already exists"):
        write_report(results, tmp_path / "new")


def test_a_report_without_choices_has_no_picture_of_them(tmp_path: Path) -> None:
    alone = RoutingShare(["public"], [[1.0]], [[1.0]])
    files = write_report(Results(SCORES, None, {"public": {"news": alone, "math|1": alone}}), tmp_path / "new")
    assert "routing_share.png" not in [path.name for path in files]


def test_nothing_is_left_of_a_report_that_cannot_be_finished(results: Results, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexolmo_megatron.evaluation.report.plot_bits_per_byte", full)
    with pytest.raises(FlexOlmoError, match="No space left on device; nothing was changed there"):
        write_report(results, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
