"""`flexolmo launch` on a real Slurm of two nodes: three experts at once and their merge, interruptions, a failure."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.exchange.digest import model_digest
from tests.slurm.cluster import NODES, Cluster, unavailable
from tests.training.runs import SMALL, metrics, write_documents

ROOT = Path(__file__).parent.parent.parent
WORDS = {
    "public": ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "the", "moon"],
    "code": ["def", "return", "for", "if", "x", "y", "=", "+", "1", "2"],
    "sums": ["one", "plus", "two", "is", "three", "times", "four"],
    "notes": ["pt", "seen", "dx", "rx", "ward", "home", "today"],
}
STEPS = 40

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(unavailable() is not None, reason=unavailable() or ""),
]


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as running:
        yield running


def launch_yaml(path: Path, out: Path, experts: dict, **sections) -> Path:
    """The YAML file of a launch of tiny models, one process on each of the two nodes."""
    world = path.parent
    options = [*SMALL[7:], f"train_iters={STEPS}", "save_interval=20", "data.seq_length=32"]
    each = {name: {"documents": [f"{world}/{name}.jsonl"], "options": [f"data.train=[{world}/{name}]", *extra]}
            for name, extra in experts.items()}
    OmegaConf.save(OmegaConf.create({
        "out": str(out),
        "slurm": {"nodes": 2, "time": "00:10:00", "python": sys.executable,
                  "setup": [f"export OMP_NUM_THREADS=1 PYTHONPATH={ROOT}"]},
        "experts": {"options": options, "each": each},
        **sections,
    }), path)
    return path


def launch(cluster: Cluster, path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "flexolmo_megatron.cli", "launch", str(path), *arguments],
                          env=cluster.environment, cwd=path.parent, capture_output=True, text=True, timeout=120)


def numbers(out: Path) -> dict[str, str]:
    return {stage: entry["job"] for stage, entry in json.loads((out / "slurm" / "jobs.json").read_text()).items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Documents and data of the public and of three owners."""
    from flexolmo_megatron.cli import main

    folder = tmp_path_factory.mktemp("world")
    for name, words in WORDS.items():
        write_documents(folder / f"{name}.jsonl", words)
        assert main(["data", f"{folder}/{name}.jsonl", "--out", f"{folder}/{name}", "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(cluster, world) -> Path:
    """The folder of an undisturbed launch of everything, once it has ended."""
    out = world / "whole"
    path = launch_yaml(
        world / "whole.yaml", out, {"code": [], "sums": [], "notes": []},
        anchor={"documents": [f"{world}/public.jsonl"], "options": [*SMALL, f"data.train=[{world}/public]"]},
        merge={"domains": {"code": [f"{world}/code.jsonl"], "sums": [f"{world}/sums.jsonl"]},
               "eval_arguments": ["--max-bytes", "500"]})
    result = launch(cluster, path)
    assert result.returncode == 0, result.stderr
    assert f"what happens is in {out}/launch.log" in result.stdout
    again = launch(cluster, path)
    assert again.returncode == 2 and "of an earlier launch into the same folder is still" in again.stderr
    jobs = numbers(out)
    assert cluster.show(jobs["merge"])["Dependency"].startswith(f"afterok:{jobs['experts']}_*")
    for stage in ("anchor", "experts", "merge"):
        cluster.wait(jobs[stage])
    return out


def logs(out: Path) -> str:
    return "\n".join(f"--- {path}\n{path.read_text()[-1500:]}"
                     for path in [out / "launch.log", *sorted((out / "logs").rglob("*.log"))])


def test_everything_from_the_anchor_to_the_evaluation(whole, cluster):
    assert (whole / "evaluation" / "results.json").exists(), logs(whole)
    print(logs(whole))
