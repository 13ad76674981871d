"""Predicted against measured peak memory of training processes on the CPU: within 10 %."""

import sys
from typing import Any

import pytest

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.launch.plan_activations import peak_activations
from flexolmo_megatron.launch.plan_state import state
from flexolmo_megatron.launch.plan_work import Layout, Work
from tests.distributed import run_distributed
from tests.launch.plan_peak import measure

EXPERTS = {"expert": dict(num_experts=2, top_k=2), "moe": dict(num_experts=4, top_k=2)}
KINDS = {"expert": "pair", "anchor": "dense"}
CASES = {
    "expert": ("expert", 4, False),
    "expert in bf16, distributed optimizer": ("expert", 2, True),
    "anchor in bf16": ("anchor", 2, False),
    "anchor": ("anchor", 4, False),
    "moe": ("moe", 4, True),
    "router": ("router", 4, False),
}


def _work(mode: str, element: int, **sizes: int) -> dict[str, Any]:
    model = ModelConfig(
        **dict(
            num_layers=3, hidden_size=512, ffn_hidden_size=1376, num_attention_heads=8, num_query_groups=8,
            vocab_size=2048, max_position_embeddings=256,
        ) | EXPERTS.get("moe" if mode == "router" else mode, {}) | sizes
    )  # fmt: skip
    return dict(
        mode=mode, kind=KINDS.get(mode, "moe"), model=model, anchor_ffn=model.ffn_hidden_size,
        sequence=model.max_position_embeddings, batch=4, element=element, backend="local",
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="measures with Linux's counters and glibc's allocator")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_peak_memory(case, monkeypatch):
    mode, element, distributed = case
    # Freed tensors go back to the system at once, so that resident memory is memory in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    layout = Layout(1, micro_batch=4, distributed=distributed)
    large = _work(mode, element)
    small = _work(mode, element, hidden_size=64, ffn_hidden_size=176, vocab_size=512, max_position_embeddings=64)
    [measured] = run_distributed(measure, 1, small, large, layout)
    work = Work(**large)
    held, activations = state(work, layout, 0), peak_activations(work, layout, 0)
    planned = held.total + activations.total
    print(f"planned {planned / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert abs(planned / measured - 1) < 0.1
    # Neither part alone would pass.
    assert max(held.total, activations.total) < 0.9 * measured
