"""examples/compare: its files can be planned, on the texts that it generates."""

import subprocess
import sys
from pathlib import Path

import pytest

from flexolmo_megatron.compare.config import check_training, load_compare
from flexolmo_megatron.compare.plan import build_comparison

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "compare"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    subprocess.run([sys.executable, str(EXAMPLES / "texts.py"), str(folder)], check=True)
    return folder


def given(files: Path, names: dict[str, str]) -> list[str]:
    """Overrides that give each domain of an example the generated texts of another name."""
    return [f"{key}.{split}=[{files}/{name}.{split}.jsonl]" for key, name in names.items() for split in
            ("train", "valid")]


def test_tiny_names_the_generated_files(files: Path) -> None:
    config = load_compare(str(EXAMPLES / "tiny.yaml"))
    for texts in config.domains.values():
        for path in (*texts.train, *texts.valid):
            assert path.startswith("runs/compare_tiny/texts/") and (files / Path(path).name).is_file()


@pytest.mark.parametrize(("example", "names"), [
    ("tiny.yaml", {"public": "public", "owners.arithmetic": "arithmetic", "owners.clinic": "clinic"}),
    ("small.yaml", {"public": "public", "owners.math": "arithmetic", "owners.code": "clinic",
                    "owners.drama": "clinic"}),
])
def test_examples_can_be_planned(files: Path, example: str, names: dict[str, str]) -> None:
    comparison = build_comparison(load_compare(str(EXAMPLES / example), given(files, names)))
    check_training(comparison.runs, processes=1)
    assert len([name for name in comparison.plan.steps if name.endswith("/scores")]) == 2
    assert len(comparison.models[1].dense) == len(names) - 1
