"""Sharded models against one process: tensor parallel with and without sequence parallel, expert and pipeline parallel.

Every layout runs in the same two processes, which compute logits and gradients of the same weights and tokens as the
test's own process. 1e-5: sums over parts round differently.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexolmo_megatron.convert.lazy import LazyModel
from tests.distributed import run_distributed
from tests.random_models import SIZES, random_model

TOKENS_BS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
MODELS = {"dense": ("dense",), "moe": ("moe", 4, 2), "pair": ("pair", 2, 2)}
TENSOR_PARALLEL = dict(tensor_model_parallel_size=2)
SEQUENCE_PARALLEL = dict(**TENSOR_PARALLEL, sequence_parallel=True)
WATCHED = ("self_attention.linear_qkv.weight", "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight",
           "linear_fc1.weight", "linear_fc2.weight", "word_embeddings.weight")


def _lazy(kind: str, *experts: int, seed: int = 1) -> LazyModel:
    return random_model(kind, *experts, seed=seed, sizes=replace(SIZES, vocab_size=256))


def _build(name: str, options: dict[str, Any], **stage: bool) -> nn.Module:
    from flexolmo_megatron.model.builder import build_model
    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.model.weights import load_anchor, load_weights

    lazy = _lazy(*MODELS[name])
    config = transformer_config(lazy.card.model, lazy.card.kind, **options)
    model = build_model(lazy.card.model, lazy.card.kind, config, **stage)
    if name == "pair":
        load_anchor(model, _lazy("moe", 1, 1, seed=2))
    load_weights(model, lazy)
    return model


def _positions() -> Tensor:
    return torch.arange(TOKENS_BS.shape[1]).expand_as(TOKENS_BS)


def _compute(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Logits, and every shard of the watched parameters' gradients with its place in the whole tensor."""
    from flexolmo_megatron.model.weights import _all_shards

    model = _build(name, options)
    model.eval()
    with torch.no_grad():
        logits = model(TOKENS_BS, _positions(), None, runtime_gather_output=True)
    gradients = []
    if name != "moe" or options != TENSOR_PARALLEL:  # Megatron trains mixtures only with sequence parallelism then
        model.train()
        model(TOKENS_BS, _positions(), None, labels=TOKENS_BS.roll(-1, 1)).mean().backward()
        for parameter in model.parameters():
            # The shards below are views of the weights; here they are to show the gradients.
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [(shard.key, shard.region, shard.data.clone()) for shard in _all_shards(model)
                     if shard.key.endswith(WATCHED)]
    return {"logits": logits, "gradients": gradients}


def _pipeline() -> Tensor | None:
    """Logits on the last of two stages, None on the first."""
    from megatron.core import parallel_state

    first = parallel_state.is_pipeline_first_stage()
    model = _build("moe", dict(pipeline_model_parallel_size=2), pre_process=first, post_process=not first).eval()
    batch, length = TOKENS_BS.shape
    hidden = torch.empty(length, batch, model.config.hidden_size)
    with torch.no_grad():
        if first:
            torch.distributed.send(model(TOKENS_BS, _positions(), None), 1)
            return None
        torch.distributed.recv(hidden, 0)
        model.set_input_tensor([hidden])
        return model(TOKENS_BS, _positions(), None)


def _first_rank_alone() -> dict[str, Any]:
    """What this rank has of a result and of an error of rank 0, and how often it computed itself."""
    from flexolmo_megatron.errors import FlexOlmoError
    from flexolmo_megatron.runtime.ranks import on_first_rank

    calls = []

    def fail() -> None:
        calls.append("fail")
        raise FlexOlmoError("the anchor is damaged")

    result = on_first_rank(lambda: calls.append("succeed") or {"digest": "abc"})
    try:
        on_first_rank(fail)
    except FlexOlmoError as error:
        return {"result": result, "error": str(error), "calls": calls}
    return {}


def compute_all_layouts() -> dict[str, Any]:
    """What each of the two processes does."""
    from flexolmo_megatron.runtime.setup import initialize, prepare

    prepare()
    from megatron.core import parallel_state

    results: dict[str, Any] = {}
    initialize(tensor_parallel=2)
    results["first rank"] = _first_rank_alone()
    for name in MODELS:
        results["tensor", name] = _compute(name, TENSOR_PARALLEL)
        results["sequence", name] = _compute(name, SEQUENCE_PARALLEL)
    parallel_state.destroy_model_parallel()
    initialize(expert_parallel=2)
    results["expert", "moe"] = _compute("moe", dict(expert_model_parallel_size=2))
    parallel_state.destroy_model_parallel()
    initialize(pipeline_parallel=2)
    results["pipeline", "moe"] = _pipeline()
    return results


@pytest.fixture(scope="module")
def sharded() -> list[dict[str, Any]]:
    return run_distributed(compute_all_layouts, 2)


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Any]]:
    from flexolmo_megatron.runtime.setup import initialize

    initialize()
    return {name: _compute(name, {}) for name in MODELS}


LAYOUTS = [("tensor", "dense"), ("tensor", "moe"), ("tensor", "pair"), ("sequence", "dense"), ("sequence", "moe"),
           ("sequence", "pair"), ("expert", "moe")]


@pytest.mark.parametrize(("layout", "name"), LAYOUTS)
def test_logits(sharded, whole, layout, name):
    expected = whole[name]["logits"]
    assert expected.std() > 0.5
    for rank in sharded:
        torch.testing.assert_close(rank[layout, name]["logits"], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("layout", "name"), [case for case in LAYOUTS if case != ("tensor", "moe")])
def test_gradients(sharded, whole, layout, name):
    expected = {}
    for key, region, gradient in whole[name]["gradients"]:
        expected.setdefault(key, []).append((region, gradient))
    # Both expert-parallel processes send the same tokens to an expert, and each counts them in its own loss.
    copies = 2 if layout == "expert" else 1
    compared = set()
    for rank in sharded:
        for key, region, gradient in rank[layout, name]["gradients"]:
            scale = copies if ".experts." in key else 1
            whole_gradient = next(_part(values, at, region) for at, values in expected[key] if _contains(at, region))
            assert whole_gradient.abs().max() > 1e-5
            torch.testing.assert_close(gradient / scale, whole_gradient, rtol=1e-4, atol=2e-6,
                                       msg=lambda text, key=key: f"{key}: {text}")
            compared.add(key)
    assert compared == set(expected)


def _contains(outer: tuple, inner: tuple) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))


def _part(values: Tensor, at: tuple, region: tuple) -> Tensor:
    index = tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(at, region, strict=True))
    return values[index[len(index) - values.ndim:]]


def test_pipeline_stages_share_one_model(sharded, whole):
    first, last = (rank["pipeline", "moe"] for rank in sharded)
    assert first is None
    torch.testing.assert_close(last, whole["moe"]["logits"], rtol=0, atol=2e-5)


def test_what_the_first_rank_does_reaches_all(sharded):
    for rank, calls in zip(sharded, (["succeed", "fail"], []), strict=True):
        assert rank["first rank"] == {
            "result": {"digest": "abc"}, "error": "the anchor is damaged", "calls": calls}
