"""Activations and traffic of the plan against what autograd keeps and torch.distributed is asked to send: exactly."""

from typing import Any

import pytest

from flexolmo_megatron.launch.plan_activations import chunk_activations, head_activations
from flexolmo_megatron.launch.plan_hardware import Hardware
from flexolmo_megatron.launch.plan_traffic import microbatch_traffic
from flexolmo_megatron.launch.plan_work import chunks
from tests.distributed import run_distributed
from tests.launch.plan_trace import Case, trace_cases, trace_expert_parallel

CASES = [
    Case("anchor"),
    Case("anchor", element=2, groups=2),
    Case("anchor", tensor=2),
    Case("expert"),
    Case("expert", element=2, narrow=88, bias=True),
    Case("expert", tensor=2),
    Case("expert", tensor=2, pipeline=2, stage=0, layers=4),
    Case("expert", tensor=2, pipeline=2, stage=1, layers=4),
    Case("moe"),
    Case("moe", element=2, tensor=2),
    Case("router", element=2),
    Case("router", tensor=2),
]
EXPERT_PARALLEL = [
    Case("moe", expert=2),
    Case("router", expert=2),
    Case("moe", tensor=2, expert=2, expert_tensor=1),
]
ANY = Hardware(1, 1, 1, 1, gpus_per_node=8, share=1)


def _name(case: Case) -> str:
    parts = [case.mode, f"{8 * case.element}bit", f"tp{case.tensor}", f"ep{case.expert}", f"stage{case.stage}"]
    return "-".join(parts)


def _planned(case: Case) -> tuple[int, float, float]:
    """Bytes kept, sent in rings and sent in all-to-alls by one process for one microbatch."""
    work, layout = case.work(), case.layout()
    [chunk] = chunks(work, layout, case.stage)
    kept = chunk_activations(work, layout, chunk) + (head_activations(work, layout) if chunk.head else 0)
    sent = microbatch_traffic(work, layout, case.stage, ANY).sent
    return kept, sent["tensor"], sent["expert"]


@pytest.fixture(scope="module")
def traced() -> list[dict[str, Any]]:
    return run_distributed(trace_cases, 1, CASES)[0]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[_name(case) for case in CASES])
def test_kept_and_sent_bytes(traced, index):
    kept, ring, exchange = _planned(CASES[index])
    assert traced[index]["saved"] == kept
    assert traced[index]["sent"].get("ring", 0) == ring
    assert (ring > 0) == (CASES[index].tensor > 1) and exchange == 0


@pytest.mark.parametrize("case", EXPERT_PARALLEL, ids=[_name(case) for case in EXPERT_PARALLEL])
def test_expert_parallel_on_average(case):
    """Which process gets how many tokens depends on the weights; the plan has the mean of all, and that is exact."""
    ranks = run_distributed(trace_expert_parallel, 2, case)
    kept, ring, exchange = _planned(case)
    assert sum(rank["saved"] for rank in ranks) == 2 * kept
    assert sum(rank["sent"]["exchange"] for rank in ranks) == 2 * exchange > 0
    assert sum(rank["sent"].get("ring", 0) for rank in ranks) == 2 * ring
