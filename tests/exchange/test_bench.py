import pytest

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.bench import Case, bench_merge, render


def test_measures_and_memory_does_not_grow(tmp_path):
    sizes = {"hidden_size": 512, "ffn_hidden_size": 1376, "vocab_size": 1024}
    lines = []
    cases = (Case(1, 1, **sizes), Case(6, 8, **sizes))
    results = bench_merge(tmp_path, cases=cases, rounds=1, report=lines.append)
    assert [timing.cache for timing in results] == ["warm", "cold"] * 2
    small, _, large, _ = results
    assert large.num_bytes > 10 * small.num_bytes > 10 * small.largest_tensor
    assert large.peak_rss[0] < small.peak_rss[0] + 100 * 2**20
    assert large.peak_rss[0] < large.largest_tensor + 2**30
    assert small.relative_speed > 0 and len(lines) == 6
    assert render(results).row_count == 4
    assert not list(tmp_path.iterdir())


def test_bad_scratch(tmp_path):
    with pytest.raises(FlexOlmoError, match="nowhere is no folder; expected one on the disk to measure"):
        bench_merge(tmp_path / "nowhere")
    with pytest.raises(FlexOlmoError, match="GB free: expected at least"):
        bench_merge(tmp_path, cases=(Case(10_000, 1000),))
