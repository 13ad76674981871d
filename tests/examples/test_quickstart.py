"""The quickstart's every step, with hardly any training: what it leaves behind, and that it goes on where it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

OWNERS = ("code", "arithmetic", "clinic")
COMMAND = [
    sys.executable,
    str(Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"),
    "--anchor-iters",
    "6",
    "--documents",
    "20",
    "--expert-iters",
    "3",
    "--evaluated-bytes",
    "1200",
]


def run(out):
    return subprocess.run(
        [*COMMAND, str(out)], capture_output=True, text=True, timeout=550, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_quickstart(tmp_path):
    out = tmp_path / "quickstart"
    result = run(out)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    bits = json.loads((out / "results.json").read_text())["bits_per_byte"]
    assert set(bits) == {
        "public",
        "merged",
        *(f"pair {owner}" for owner in OWNERS),
        *(f"without {owner}" for owner in OWNERS),
    }
    for values in bits.values():
        assert set(values) == {"public", *OWNERS}
        assert all(0 < value < 10 for value in values.values())
    for picture in ("bits_per_byte", "routing_share", "opt_out"):
        assert (out / "evaluation" / f"{picture}.png").stat().st_size > 10_000
    assert (out / "training.png").stat().st_size > 10_000
    assert str(out / "results.json") in result.stdout

    # Again: nothing is trained a second time.
    checkpoint = out / "merged" / "flexolmo.json"
    before = checkpoint.stat().st_mtime_ns
    again = run(out)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "flexolmo train" not in again.stdout
    assert checkpoint.stat().st_mtime_ns == before
