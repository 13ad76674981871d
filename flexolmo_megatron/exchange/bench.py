"""``flexolmo bench merge``: merging against a plain copy of the same bytes, and its peak memory.

For each case an anchor and packages of random numbers are made in a scratch directory. Then, in turn, all their files
are copied with ``shutil.copyfile``, and they are merged (verification and hashing included). Each runs in a process of
its own and is timed, without the start of the process, up to and including fsync. That is done with the files in the
page cache (warm), and with them dropped from it before each measurement (cold), as with models larger than memory.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table

from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, ModelCard
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.model import open_model, save_model, total_bytes
from flexolmo_megatron.convert.names import expected_tensors
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.exchange.merge import write_merged
from flexolmo_megatron.exchange.package import pack
from flexolmo_megatron.files import fsync_path


@dataclass(frozen=True)
class Case:
    """One size to measure; all tensors are BF16."""

    num_layers: int
    num_packages: int
    hidden_size: int = 2048
    ffn_hidden_size: int = 5504
    vocab_size: int = 8192

    def config(self, num_experts: int) -> ModelConfig:
        return ModelConfig(num_layers=self.num_layers, hidden_size=self.hidden_size, vocab_size=self.vocab_size,
                           ffn_hidden_size=self.ffn_hidden_size, num_attention_heads=16, num_query_groups=16,
                           num_experts=num_experts, top_k=num_experts)


CASES = (Case(num_layers=4, num_packages=2), Case(num_layers=8, num_packages=6))
"""About 1 and 4.1 GB: the second has twice the layers and more than twice the experts. An anchor is 1.7 times the size
of a package, as at 7 B parameters."""


@dataclass
class Timing:
    """What was measured for one case. Lists have one number for each round."""

    case: Case
    num_bytes: int
    """Of the merged model's tensors, which are those of the anchor and the packages."""
    largest_tensor: int
    """In bytes."""
    cold: bool
    """Whether the files had to be read from disk."""
    copy_seconds: list[float] = field(default_factory=list)
    merge_seconds: list[float] = field(default_factory=list)
    peak_rss: list[int] = field(default_factory=list)
    """Largest resident memory of the merging process, Python and torch included, in bytes."""

    @property
    def cache(self) -> str:
        return "cold" if self.cold else "warm"

    @property
    def relative_speed(self) -> float:
        """Speed of merging over speed of copying, of the median rounds."""
        return statistics.median(self.copy_seconds) / statistics.median(self.merge_seconds)


def bench_merge(scratch: str | os.PathLike | None = None, *, cases: tuple[Case, ...] = CASES, rounds: int = 3,
                format: str = "megatron", report: Callable[[str], object] = print) -> list[Timing]:
    """Measure each case, warm and cold, in ``scratch`` and leave nothing there.

    Args:
        scratch: existing folder on the disk to measure; the system's temporary folder by default.
        rounds: how often each case is copied and merged, in turn.
        format: of the merged model, "megatron" or "hf".
        report: called with a line after each step.

    Raises:
        FlexOlmoError: ``scratch`` does not exist or has too little space.
    """
    if scratch is not None and not Path(scratch).is_dir():
        raise FlexOlmoError(f"{scratch} is no folder; expected one on the disk to measure")
    results = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="flexolmo_bench_", dir=scratch) as folder:
            results += _measure(case, Path(folder), rounds, format, report)
    return results


def render(timings: list[Timing]) -> Table:
    """Return the measurements as a table for a rich console."""
    table = Table(title="merging against copying the same bytes, fsync included; medians")
    for column in ("layers", "experts", "GB", "page cache", "copy s", "merge s", "merge/copy speed", "peak MiB",
                   "above largest tensor MiB"):
        table.add_column(column, justify="right")
    for timing in timings:
        copying, merging = statistics.median(timing.copy_seconds), statistics.median(timing.merge_seconds)
        table.add_row(str(timing.case.num_layers), str(timing.case.num_packages + 1), f"{timing.num_bytes / 1e9:.2f}",
                      timing.cache, f"{copying:.2f}", f"{merging:.2f}",
                      f"{timing.relative_speed:.2f}", f"{max(timing.peak_rss) / 2**20:,.0f}",
                      f"{(max(timing.peak_rss) - timing.largest_tensor) / 2**20:,.0f}")
    return table


def _measure(case: Case, folder: Path, rounds: int, format: str, report: Callable[[str], object]) -> list[Timing]:
    anchor = _random_model(ModelCard("moe", case.config(1), [ExpertRecord(PUBLIC)]))
    pair = _random_model(ModelCard("pair", case.config(2), [ExpertRecord(PUBLIC), ExpertRecord("expert")]))
    num_bytes = total_bytes(anchor) + case.num_packages * total_bytes(pair)
    free = shutil.disk_usage(folder).free
    if free < 2.2 * num_bytes:
        raise FlexOlmoError(f"{folder.parent} has {free / 1e9:.1f} GB free: expected at least "
                            f"{2.2 * num_bytes / 1e9:.1f} GB for the files and one copy of them")
    report(f"{case.num_layers} layers, {case.num_packages} packages: writing {num_bytes / 1e9:.2f} GB")
    inputs = [folder / "anchor", *(folder / f"package_{number}" for number in range(case.num_packages))]
    save_model(anchor, inputs[0], format="hf")
    digest = model_digest(anchor)
    for number, package in enumerate(inputs[1:]):
        pack(pair, digest, package, name=f"expert_{number}")
    largest = max(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in anchor.tensors.values())
    timings = [Timing(case, num_bytes, largest, cold) for cold in (False, True)]
    for number in range(rounds):
        for timing in timings:
            _prepare(inputs, timing.cold)
            copying, _ = _in_child(inputs, folder / "copy", "copy")
            _prepare(inputs, timing.cold)
            merging, peak = _in_child(inputs, folder / "merged", format)
            timing.copy_seconds.append(copying)
            timing.merge_seconds.append(merging)
            timing.peak_rss.append(peak)
            report(f"round {number + 1}, {timing.cache}: copy {copying:.2f} s, merge {merging:.2f} s, "
                   f"peak {peak / 2**20:,.0f} MiB")
    return timings


def _random_model(card: ModelCard) -> LazyModel:
    """Random numbers; tensors of one shape are equal, because making them all takes too long."""
    tensors: dict[tuple[int, ...], torch.Tensor] = {}
    shapes = expected_tensors(card.model, card.kind)
    for shape in set(shapes.values()):
        tensors[shape] = (torch.randn(shape) * 0.02).to(torch.bfloat16)
    return LazyModel(card, {name: LazyTensor(torch.bfloat16, shape, tensors[shape].clone)
                            for name, shape in shapes.items()})


def _prepare(inputs: list[Path], cold: bool) -> None:
    os.sync()  # what was written before must not be waited for in a measurement
    if cold and hasattr(os, "posix_fadvise"):
        for file in (file for folder in inputs for file in folder.iterdir()):
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_child(inputs: list[Path], out: Path, method: str) -> tuple[float, int]:
    """Copy or merge in a new process, so that both meet the same state of memory; return seconds and peak memory."""
    command = [sys.executable, "-m", __name__, method, str(out), *map(str, inputs)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise FlexOlmoError(f"the measured process ended with status {child.returncode}; see its message above")
    result = json.loads(child.stdout)
    shutil.rmtree(out)
    return result["seconds"], result["peak_rss"]


def _copy(inputs: list[str], out: Path) -> None:
    out.mkdir()
    for number, source in enumerate(inputs):
        for file in Path(source).iterdir():
            target = out / f"{number}_{file.name}"
            shutil.copyfile(file, target)
            fsync_path(target)
    fsync_path(out)


def _peak_rss() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not the first choice: on Linux a child starts with its parent's maximum

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _run_child(method: str, out: str, *inputs: str) -> None:
    start = time.perf_counter()
    if method == "copy":
        _copy(list(inputs), Path(out))
    else:
        write_merged(open_model(inputs[0]), inputs[1:], out, format=method)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_rss": _peak_rss()}))


if __name__ == "__main__":
    _run_child(*sys.argv[1:])
