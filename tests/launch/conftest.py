"""A launch of two experts, and its scripts where they look for one another."""

from pathlib import Path

import pytest

from tests.launch.launches import LAUNCH, dry_run, scripts


@pytest.fixture
def launch_file(tmp_path) -> Path:
    path = tmp_path / "launch.yaml"
    path.write_text(LAUNCH.format(out=tmp_path / "out"))
    return path


@pytest.fixture
def saved(capsys, launch_file, tmp_path, monkeypatch):
    """A function that gives a stage's script, with its functions saved where it looks for them."""
    monkeypatch.chdir(tmp_path)

    def save(stage: str, *overrides: str) -> str:
        parts = scripts(dry_run(capsys, launch_file, *overrides))
        (tmp_path / "out" / "slurm").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "slurm" / "functions.sh").write_text(parts["functions.sh"])
        return parts[f"{stage}.sbatch"]

    return save
