"""Work in shards on a real Slurm of two nodes: proxies, and a data set that is bitwise what one machine makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable

ROOT = Path(__file__).parent.parent.parent
SLURM = f"""\
partition: batch
time: 00:10:00
memory: 100M
setup: [export OMP_NUM_THREADS=1 PYTHONPATH={ROOT}]
"""

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1200),  # a machine with other work
    pytest.mark.skipif(unavailable() is not None, reason=unavailable() or ""),
]


def flexolmo(*words, environment=None):
    return subprocess.run([sys.executable, "-m", "flexolmo_megatron.cli", *map(str, words)], cwd=ROOT,
                          env=environment or os.environ, capture_output=True, text=True, timeout=900)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as running:
        yield running


def test_proxies_and_a_failure(cluster, tmp_path):
    write(tmp_path / "owner.jsonl", [f"lemma proof prime {number} theorem" for number in range(30)])
    unlike = [f"market vote storm {number} city" for number in range(30)]
    write(tmp_path / "a.jsonl", [*unlike, "lemma proof prime 3 theorem"])
    write(tmp_path / "b.jsonl", [f"integer lemma proof {number} theorem" for number in range(10)])
    (tmp_path / "slurm.yaml").write_text(SLURM + "tasks: 2\n")
    words = ["proxy", tmp_path / "owner.jsonl", "--public", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--tokens", 300]
    here = flexolmo(*words, "--workers", 1, "--out", tmp_path / "here")
    assert here.returncode == 0, here.stderr
    there = flexolmo(*words, "--slurm", tmp_path / "slurm.yaml", "--out", tmp_path / "there",
                     environment=cluster.environment)
    assert there.returncode == 0, there.stderr
    assert "proxy_scoring: job " in there.stderr and "Slurm, the queue included" in there.stdout
    for name in ("proxies.jsonl", "report.json", "scores.png"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name
    assert not (tmp_path / "there.state").exists()

    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("{\n")
    failed = flexolmo(*words, "--slurm", tmp_path / "slurm.yaml", "--out", tmp_path / "no", "--max-bad", 0,
                      environment=cluster.environment)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1] == (
        f"flexolmo: 1 unusable document (1 broken JSON), first {tmp_path}/b.jsonl:11 (broken JSON): more than the 0 "
        "that --max-bad allows")


def test_a_data_set(cluster, tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [f"{name} {number} " + "word " * number for number in range(20)])
    (tmp_path / "slurm.yaml").write_text(SLURM)
    words = ["data", f"{tmp_path}/*.jsonl", "--valid-share", 0.3]
    assert flexolmo(*words, "--workers", 1, "--out", tmp_path / "here").returncode == 0
    there = flexolmo(*words, "--slurm", tmp_path / "slurm.yaml", "--out", tmp_path / "there",
                     environment=cluster.environment)
    assert there.returncode == 0, there.stderr
    for suffix in ("_train.bin", "_train.idx", "_train.json", "_valid.bin", "_valid.idx", "_valid.json"):
        assert Path(f"{tmp_path}/there{suffix}").read_bytes() == Path(f"{tmp_path}/here{suffix}").read_bytes(), suffix
