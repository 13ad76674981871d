"""The table over seeds."""

import csv
import io
import statistics

import pytest

from flexolmo_megatron.compare.table import build_table
from flexolmo_megatron.errors import FlexOlmoError


def scores(seed: int, **bits: tuple[float, float, float]) -> dict:
    """Of one seed: by method, its bits per byte on public, math and mixed texts."""
    names = {"weighted": "oracle"}
    methods = [{"name": name, "group": "opt-outs" if name.startswith("without") else "methods", "family": "x",
                "definition": f"what {name} | is", "source": "here", "sees": names.get(name, "causal"),
                "inference": "1 pass", "training": "public", "training_tokens": 2_500_000, "training_flops": 3_000_000,
                "scores": {domain: {"bits_per_byte": value} for domain, value in
                           zip(("public", "math", "mixed"), values, strict=True)}} for name, values in bits.items()]
    return {"seed": seed, "methods": methods}


BOTH = [scores(1, public=(2.0, 4.0, 3.0), weighted=(1.0, 1.0, 9.0), merged=(2.2, 3.0, 2.5), without=(9.0, 9.0, 9.0)),
        scores(5, public=(2.4, 4.2, 3.2), weighted=(1.0, 1.0, 9.0), merged=(2.6, 3.4, 2.7), without=(9.0, 9.0, 9.0))]


def test_means_spreads_and_average_of_the_domains() -> None:
    table = build_table(BOTH, ["public", "math"])
    assert (table.seeds, table.columns) == ([1, 5], ["public", "math", "average", "mixed"])
    merged = table.row("merged")
    assert merged.mean("math") == pytest.approx(3.2)
    assert merged.values["average"] == pytest.approx([2.6, 3.0])
    assert merged.spread("average") == pytest.approx(statistics.stdev([2.6, 3.0]))
    assert table.row("nothing") is None


def test_an_oracle_is_never_the_best() -> None:
    table = build_table(BOTH, ["public", "math"])
    assert [table.best("methods", column) for column in table.columns] == ["public", "merged", "merged", "merged"]


def test_markdown_has_a_table_for_each_group() -> None:
    text = build_table(BOTH, ["public", "math"]).to_markdown()
    lines = text.splitlines()
    assert lines[0] == "## Methods" and "## Opt-outs" in lines and "## Ablations" not in lines
    assert "| method | public | math | average | mixed | training tokens | training FLOPs |" in lines
    assert ("| merged | 2.400 ± 0.283 | **3.200 ± 0.283** | **2.800 ± 0.283** | **2.600 ± 0.141** | 2.50 M | 3.00e+06 |"
            in lines)
    assert "| weighted † | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 9.000 ± 0.000 | 2.50 M | 3.00e+06 |" in lines
    assert "| merged | what merged \\| is | public | 1 pass | here |" in lines
    assert "mean ± standard deviation over 2 seeds (1, 5)" in text


def test_merged_models_are_compared_with_the_best_single_model() -> None:
    both = [scores(1, public=(2.0, 4.0, 3.0), **{"dense math": (3.0, 2.0, 4.0), "FlexOlmo": (2.1, 1.9, 2.4)})]
    table = build_table(both, ["public", "math"])
    assert [table.best_single(column) for column in table.columns] == ["public", "dense math", "dense math", "public"]
    assert [round(table.change(table.row("FlexOlmo"), column), 6) for column in table.columns] == [5, -5, -20, -20]
    assert "| FlexOlmo | +5.0 % | -5.0 % | -20.0 % | -20.0 % |" in table.to_markdown()
    assert "Does merging pay?" not in build_table(BOTH, ["public", "math"]).to_markdown()


def test_csv_has_a_line_for_each_method_and_column() -> None:
    rows = list(csv.DictReader(io.StringIO(build_table(BOTH, ["public", "math"]).to_csv())))
    assert len(rows) == 4 * 4
    row = next(row for row in rows if (row["method"], row["domain"]) == ("merged", "mixed"))
    assert (float(row["bits_per_byte"]), float(row["seed_1"]), float(row["seed_5"])) == (pytest.approx(2.6), 2.5, 2.7)


def test_one_seed_has_no_spread() -> None:
    table = build_table(BOTH[:1], ["public", "math"])
    assert table.row("merged").spread("math") is None
    assert "| merged | 2.200 | **3.000** |" in table.to_markdown() and "mean over 1 seed (1)" in table.to_markdown()
    assert table.to_json()["methods"][2]["bits_per_byte"]["math"] == {"mean": 3.0, "spread": None, "seeds": [3.0]}


def test_ablations_that_change_nothing_are_named_under_the_table() -> None:
    text = build_table(BOTH, ["public", "math"], ["no embedding init, no bias", "paper"]).to_markdown()
    assert "not trained again: 'no embedding init, no bias', 'paper'.\n\n## What they are" in text


def test_seeds_with_other_methods_are_refused() -> None:
    with pytest.raises(FlexOlmoError, match="seeds 1 and 2 were evaluated with other methods"):
        build_table([BOTH[0], scores(2, public=(1.0, 1.0, 1.0))], ["public", "math"])
