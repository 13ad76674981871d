"""Pictures are drawn, are not empty, and say what they show."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.plots import plot_bits_per_byte, plot_curves, plot_opt_out, plot_routing_share
from flexolmo_megatron.evaluation.routing import RoutingShare

NUMBERS = {"public": {"news": 2.0, "math": 3.0}, "merged": {"news": 2.1, "math": 1.5},
           "without math": {"news": 2.05, "math": 2.9}}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """All texts of the latest figure that was saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return lambda: "\n".join(text.get_text() for text in figures[-1].findobj(Text))


def assert_picture(path: Path) -> None:
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


def test_matrix(tmp_path: Path, drawn: Callable[[], str]) -> None:
    plot_bits_per_byte(NUMBERS, tmp_path / "a.png", "public")
    assert_picture(tmp_path / "a.png")
    for text in ("without math", "news", "1.500\n-50.0 %", "change from public (%)", "Bits per byte"):
        assert text in drawn()
    plot_bits_per_byte(NUMBERS, tmp_path / "b.png")
    assert "3.000\n+100.0 %" in drawn()
    assert "above the best of the column (%)" in drawn()


def test_a_matrix_of_one_number(tmp_path: Path) -> None:
    plot_bits_per_byte({"a": {"b": 1.0}}, tmp_path / "a.png", "a")
    assert_picture(tmp_path / "a.png")


def test_routing(tmp_path: Path, drawn: Callable[[], str]) -> None:
    three = RoutingShare(["public", "math", "law"], [[0.5, 0.3, 0.2]] * 2, [[1.0, 0.0, 0.0]] * 2)
    two = RoutingShare(["public", "law"], [[0.5, 0.5]] * 2, [[1.0, 0.0]] * 2)
    plot_routing_share({"merged": {"news": three, "math": three}, "pair": {"news": two, "math": two}},
                       tmp_path / "a.png")
    assert_picture(tmp_path / "a.png")
    for text in ("merged", "pair", "news", "math", "law", "layer", "share of routing weight (%)"):
        assert text in drawn().splitlines()


def test_more_experts_than_colours(tmp_path: Path) -> None:
    names = [f"expert {number}" for number in range(20)]
    share = RoutingShare(names, [[0.05] * 20] * 32, [[0.05] * 20] * 32)
    plot_routing_share({"merged": {"news": share}}, tmp_path / "a.png")
    assert_picture(tmp_path / "a.png")


def test_opting_out(tmp_path: Path, drawn: Callable[[], str]) -> None:
    plot_opt_out(NUMBERS, tmp_path / "a.png", public="public", merged="merged", opted_out={"math": "without math"})
    assert_picture(tmp_path / "a.png")
    for text in ("without math", "news", "bits per byte (lower is better)", "2.90"):
        assert text in drawn().splitlines()


def test_curves(tmp_path: Path, drawn: Callable[[], str]) -> None:
    steps = {step: {"step": step, "loss": 3 / step, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 5.0}
             for step in range(1, 9)}
    steps[8]["valid_loss"] = 1.0
    plot_curves({"runs/a": steps, "runs/b": {1: {"step": 1, "loss": 2.0}}}, tmp_path / "a.png")
    assert_picture(tmp_path / "a.png")
    for text in ("runs/a", "runs/b", "validation", "step", "loss (nats per token)", "learning rate", "gradient norm",
                 "tokens per second"):
        assert text in drawn().splitlines()


def test_curves_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FlexOlmoError, match="runs/a: no metric to draw; expected some of loss, lr"):
        plot_curves({"runs/a": {1: {"step": 1}}}, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FlexOlmoError, match="cannot write .*nowhere"):
        plot_bits_per_byte(NUMBERS, tmp_path / "nowhere" / "a.png")
