"""Reading the metrics of a training run."""

from pathlib import Path

import pytest

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.metrics import read_metrics


def write(folder: Path, text: str) -> Path:
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_a_run_or_its_file(tmp_path: Path) -> None:
    run = write(tmp_path, '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0, "valid_loss": 2.5}\n')
    expected = {1: {"step": 1, "loss": 3.0}, 2: {"step": 2, "loss": 2.0, "valid_loss": 2.5}}
    assert read_metrics(run) == expected
    assert read_metrics(run / "metrics.jsonl") == expected


def test_a_repeated_step_counts_once_with_its_later_values(tmp_path: Path) -> None:
    run = write(tmp_path, '{"step": 2, "loss": 9}\n{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n')
    assert [(step, record["loss"]) for step, record in read_metrics(run).items()] == [(1, 3), (2, 2)]


def test_an_unfinished_last_line_is_ignored_and_no_other(tmp_path: Path) -> None:
    assert list(read_metrics(write(tmp_path, '{"step": 1}\n{"step": 2, "lo'))) == [1]
    for line in ('{"step": 2, "lo', '{"loss": 2}', "[]", '{"step": null}', '{"step": 1e400}'):
        with pytest.raises(FlexOlmoError, match=r"metrics.jsonl:1 is not a JSON object with a 'step'"):
            read_metrics(write(tmp_path, f'{line}\n{{"step": 3}}\n'))


def test_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(FlexOlmoError, match="has no finished step yet"):
        read_metrics(write(tmp_path, "\n"))
    with pytest.raises(FlexOlmoError, match="nowhere does not exist; expected the folder of a training run"):
        read_metrics(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(FlexOlmoError, match="cannot be read as metrics of a training run"):
        read_metrics(tmp_path)
