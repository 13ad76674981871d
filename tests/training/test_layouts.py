"""Training in every parallel layout against one process: the same start, losses, validation and trained tensors.

All layouts run one after the other in the same four processes (gloo, fp32), some by themselves, the others as links of
a chain, in which each layout goes on from the checkpoint of the one before.
"""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert import megatron
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.megatron_writer import save_megatron
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.domain.publish import dense_digest
from flexolmo_megatron.domain.vector import DomainVector, save_vector
from flexolmo_megatron.exchange.digest import model_digest
from tests.distributed import run_distributed
from tests.random_models import lazy_model, random_model
from tests.training.runs import write_documents

SIZES = ModelConfig(num_layers=4, hidden_size=32, ffn_hidden_size=32, num_attention_heads=4, num_query_groups=4,
                    vocab_size=264, max_position_embeddings=16)
STEPS = 20
OPTIONS = ["data.seq_length=16", "global_batch_size=4", "micro_batch_size=1", "eval_iters=1",
           "optimizer.lr=3e-3", "optimizer.lr_warmup_iters=2", "optimizer.adam_eps=1e-3",
           "log_interval=100"]
MOE_SIZES = [f"model.{name}={value}" for name, value in vars(SIZES).items()
             if name not in ("num_experts", "top_k", "router_bias", "router_window", "init_method_std")]
DISTRIBUTED_OPTIMIZER = "optimizer.use_distributed_optimizer=true"


def _layout(*options: str, **sizes: Any) -> list[str]:
    return [*(f"parallel.{name}={str(value).lower()}" for name, value in sizes.items()), *options]


# As few microbatches as a layout can do with: each costs four processes in step.
ALONE = {
    "pair": {
        "dp4, distributed optimizer": _layout(DISTRIBUTED_OPTIMIZER),
        "tp4 sp": _layout("micro_batch_size=4", tensor=4, sequence=True),
        "pp2 vpp2 dp2": _layout(pipeline=2, virtual_pipeline=2),
        "tp2 pp2": _layout("micro_batch_size=2", tensor=2, pipeline=2),
        "tp2 sp pp2 vpp2, distributed optimizer": _layout(
            "micro_batch_size=2", DISTRIBUTED_OPTIMIZER, tensor=2, sequence=True, pipeline=2, virtual_pipeline=2),
        "cp2 dp2": _layout("micro_batch_size=2", context=2),
    },
    "moe": {
        "ep4": _layout(expert=4),
        "ep2 dp2, allgather": _layout(expert=2, moe_token_dispatcher_type="allgather"),
        "ep2 tp2 sp": _layout("micro_batch_size=2", expert=2, tensor=2, sequence=True),
        "ep4 tp2 sp etp1, distributed optimizer": _layout(
            "micro_batch_size=2", DISTRIBUTED_OPTIMIZER, expert=4, tensor=2, sequence=True, expert_tensor=1),
        "ep2 pp2 vpp2": _layout(expert=2, pipeline=2, virtual_pipeline=2),
        "ep2 cp2": _layout("micro_batch_size=2", expert=2, context=2),
    },
}
LINK = 4  # steps of each layout of a chain
CHAINS = {
    "pair": {
        "chain": [
            _layout("micro_batch_size=2", tensor=2),
            _layout(pipeline=2),
            _layout("micro_batch_size=4", context=2, tensor=2, sequence=True),
            _layout(pipeline=4),
            _layout(),
        ],
        "chain, distributed optimizer": [
            _layout(DISTRIBUTED_OPTIMIZER),
            _layout(DISTRIBUTED_OPTIMIZER, "micro_batch_size=2", tensor=2, sequence=True),
            _layout(pipeline=2, virtual_pipeline=2),  # the optimizer's kind changes as well
            _layout(DISTRIBUTED_OPTIMIZER, "micro_batch_size=2", context=2, pipeline=2),
            _layout(DISTRIBUTED_OPTIMIZER, "micro_batch_size=2", tensor=2, pipeline=2),
        ],
    },
    "moe": {
        "chain": [
            _layout(),
            _layout("micro_batch_size=2", expert=2, tensor=2, sequence=True, moe_token_dispatcher_type="allgather"),
            _layout("micro_batch_size=2", tensor=2, sequence=True, pipeline=2),
            _layout(expert=4),
            _layout(expert=2, pipeline=2, virtual_pipeline=2),
        ],
        "chain, distributed optimizer": [
            _layout(DISTRIBUTED_OPTIMIZER, expert=2),
            _layout(DISTRIBUTED_OPTIMIZER, "micro_batch_size=2", tensor=2, sequence=True, pipeline=2),
            _layout(),  # the optimizer's kind changes as well
            _layout(DISTRIBUTED_OPTIMIZER, "micro_batch_size=2", expert=2, tensor=2, sequence=True),
            _layout(expert=4),
        ],
    },
}
RUNS = [(kind, name) for kind in ALONE for name in [*ALONE[kind], *CHAINS[kind]]]


def _command(kind: str, world: Path, name: str, *options: str, steps: int = STEPS) -> list[str]:
    start = (["expert", f"anchor={world}/anchor", "expert.name=own", f"expert.domain_vector={world}/own.npz",
              "expert.drift_coeff=0.05", "expert.routing_noise=0.5", "expert.router_window=5"] if kind == "pair"
             else ["moe", *MOE_SIZES, "model.num_experts=4", "model.top_k=2", "model.router_bias=true",
                   "model.router_window=5", "model.init_method_std=0.1"])
    return ["train", *start, *OPTIONS, f"train_iters={steps}", f"data.train=[{world}/own]",
            f"data.valid=[{world}/own]", f"out={world / kind / name}", *options]


def _started_as_drawn(planned: Any, chunks: list) -> tuple[int, list[str]]:
    """Numbers that this rank holds, and the keys of those that differ from the tensors of the run's source."""
    from flexolmo_megatron.convert.names import fill_region, megatron_tensors
    from flexolmo_megatron.model.weights import _all_shards

    stored = megatron_tensors(planned.card.model, planned.card.kind)
    shards = list(_all_shards(chunks))
    differing = [
        shard.key for shard in shards
        if not fill_region(stored[shard.key], shard.offset, shard.sizes, planned.source.tensors)
        .view_as(shard.data).equal(shard.data)]
    return sum(shard.data.numel() for shard in shards), differing


def _count_traffic(world: Path) -> dict[str, Any]:
    """What this rank sends in one step of a pair in two stages of two processes each."""
    from megatron.core import parallel_state

    counts: dict[str, Any] = {"sends": [], "tensor": [], "embedding": 0}
    send, reduce = torch.distributed.batch_isend_irecv, torch.distributed.all_reduce

    def counting_send(operations):
        counts["sends"] += [op.tensor.numel() for op in operations if op.op is torch.distributed.isend]
        return send(operations)

    def counting_reduce(tensor, *args, **kwargs):
        group = kwargs.get("group")
        if group is parallel_state.get_tensor_model_parallel_group():
            counts["tensor"].append(tensor.numel())
        counts["embedding"] += group is not None and group is parallel_state.get_embedding_group()
        return reduce(tensor, *args, **kwargs)

    torch.distributed.batch_isend_irecv, torch.distributed.all_reduce = counting_send, counting_reduce
    try:
        options = [*_layout(tensor=2, pipeline=2), "data.valid=[]", "optimizer.lr_warmup_iters=0"]
        assert main(_command("pair", world, "traffic", *options, steps=1)) == 0
    finally:
        torch.distributed.batch_isend_irecv, torch.distributed.all_reduce = send, reduce
    return counts


def _forget_layout() -> None:
    """End Megatron's process groups; parallel_state alone leaves each one's threads behind, fifty for a layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


def run_all(world: Path) -> dict[str, Any]:
    """What each of the four processes does."""
    from flexolmo_megatron.runtime.setup import prepare

    prepare()
    from flexolmo_megatron.training import run

    results: dict[str, Any] = {"starts": {}}
    started: list[tuple[int, list[str]]] = []
    real_start = run.start

    def checked_start(planned, config, resumes):
        begun = real_start(planned, config, resumes)
        if planned.card.kind == "moe" and not resumes:
            started.append(_started_as_drawn(planned, begun.chunks))
        return begun

    run.start = checked_start
    for kind in ALONE:
        for name, options in ALONE[kind].items():
            assert main(_command(kind, world, name, *options)) == 0, name
            _forget_layout()
        for name, links in CHAINS[kind].items():
            for options in links:
                assert main(_command(kind, world, name, *options, f"stop_after={LINK}")) == 0, options
                _forget_layout()
    results["starts"] = started
    results["traffic"] = _count_traffic(world)
    return results


def _write_discriminant(anchor: LazyModel, path: Path) -> None:
    """Any one: rows about as long as the anchor's, and a mean that the anchor's states are away from."""
    random = np.random.default_rng(5)
    shape = SIZES.num_layers, SIZES.hidden_size
    rows, mean, deviation = (array.astype(np.float32) for array in (
        random.normal(size=shape) / SIZES.hidden_size**0.5, random.normal(size=shape), random.uniform(1, 2, shape)))
    save_vector(DomainVector(rows, "anchor", "0" * 64, dense_digest(anchor), 1, 0, 0, 1.0, centred=True,
                             biases=np.zeros(len(rows), np.float32), moments=np.stack([mean, deviation])), path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data, an anchor, and the runs of one process."""
    folder = tmp_path_factory.mktemp("layouts")
    write_documents(folder / "own.jsonl", ["def", "return", "for", "if", "x", "y", "=", "+", "1", "2"])
    assert main(["data", f"{folder}/own.jsonl", "--out", f"{folder}/own", "--workers", "1"]) == 0
    anchor = random_model("moe", 1, 1, seed=2, sizes=SIZES)
    save_megatron(anchor, folder / "anchor")
    _write_discriminant(anchor, folder / "own.npz")
    for kind in ALONE:
        assert main(_command(kind, folder, "whole")) == 0
    return folder


@pytest.fixture(scope="module")
def ranks(world) -> list[dict[str, Any]]:
    return run_distributed(run_all, 4, world, timeout=550)


def _rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _apart(one: float, other: float) -> float:
    return abs(one - other) / abs(one)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: ", ".join(run))
def test_a_layout_trains_as_one_process_does(world, ranks, run):
    kind, name = run
    one, many = _rows(world / kind / "whole"), _rows(world / kind / name)
    assert [row["step"] for row in many] == list(range(1, STEPS + 1))
    assert _apart(one[0]["loss"], many[0]["loss"]) < 1e-6
    for before, after in zip(one, many, strict=True):
        assert _apart(before["loss"], after["loss"]) < 1e-4
        # Norms and the z-loss are sums of squares of what differs in the last place.
        assert _apart(before["grad_norm"], after["grad_norm"]) < 1e-3
        assert _apart(before["z_loss"], after["z_loss"]) < 1e-3
        if kind == "pair":
            assert before["step"] == 1 or before["mean_drift"] > 1
            assert abs(before["mean_drift"] - after["mean_drift"]) <= 1e-4 * before["mean_drift"]
    assert _apart(one[-1]["valid_loss"], many[-1]["valid_loss"]) < 1e-4
    expected, trained = open_model(world / kind / "whole"), open_model(world / kind / name)
    assert expected.tensors.keys() == trained.tensors.keys()
    for key, tensor in expected.tensors.items():
        # Rounding, carried along for 20 steps; OPTIONS keeps Adam from dividing by gradients that are rounding alone.
        # A mixture's top-k choice turns rounding into jumps, so it gets more room than a pair.
        tolerance = 1e-4 if kind == "moe" else 1e-5
        torch.testing.assert_close(trained.tensors[key].read(), tensor.read(), rtol=0, atol=tolerance, msg=key)


def test_random_weights_are_the_same_bit_by_bit_in_any_layout(ranks):
    model = random_model("moe", 4, 2, bias=True, sizes=SIZES)
    total = sum(torch.Size(tensor.shape).numel() for tensor in model.tensors.values())
    runs = len(ALONE["moe"]) + len(CHAINS["moe"])
    for rank in ranks:
        assert len(rank["starts"]) == runs
        assert not [keys for _, keys in rank["starts"] if keys]
        assert all(0 < numbers <= total for numbers, _ in rank["starts"])
    ep4 = list(ALONE["moe"]).index("ep4")
    experts = sum(torch.Size(tensor.shape).numel() for name, tensor in model.tensors.items() if ".experts." in name)
    assert [rank["starts"][ep4][0] for rank in ranks] == [total - experts * 3 // 4] * 4


def test_the_public_bias_does_not_train_in_any_layout(world, ranks):
    for name in [*ALONE["moe"], *CHAINS["moe"]]:
        model = open_model(world / "moe" / name)
        for layer in range(SIZES.num_layers):
            bias = model.tensors[f"model.layers.{layer}.mlp.gate.bias"].read()
            assert bias[0] == 0 and (bias[1:] != 0).any()


def test_a_pipeline_of_pairs_sends_what_is_needed_and_no_more(ranks):
    """Counted in one step: 2 layers per stage, 4 microbatches of one sequence, 2 tensor-parallel processes.

    All of the tensor-parallel sums of a whole activation are listed: forward, per layer, those of attention and of both
    FFNs; backward, per layer, the gradient of attention's input and of both FFNs' inputs. The first layer's input comes
    from frozen weights alone, so it has none of the latter three.
    """
    microbatches, activation = 4, 16 * SIZES.hidden_size
    first, last = 1 + 2 * 3 + 3, 2 * 3 + 1 + 2 * 3  # the embedding; the output layer's input
    for rank, sums in zip(ranks, (first, first, last, last), strict=True):
        traffic = rank["traffic"]
        # One activation forwards or one gradient backwards per microbatch; nothing else passes between the stages.
        assert traffic["sends"] == [activation] * microbatches
        assert traffic["tensor"].count(activation) == sums * microbatches
        assert traffic["embedding"] == 0  # embedding and output layer are frozen, and not tied


@pytest.mark.parametrize("name", [name for name in RUNS if name[0] == "pair"], ids=lambda run: run[1])
def test_packing_does_not_depend_on_the_layout_of_the_checkpoint(world, ranks, tmp_path, name):
    run = world / "pair" / name[1]
    save_megatron(open_model(run), tmp_path / "one_piece")
    packages = []
    for source in (run, tmp_path / "one_piece"):
        package = tmp_path / f"package_of_{source.name}"
        assert main(["pack", str(source), str(package)]) == 0
        packages.append((package / "expert.safetensors").read_bytes())
    assert packages[0] == packages[1]


@pytest.mark.parametrize("name", [name for name in RUNS if name[0] == "moe"], ids=lambda run: run[1])
def test_a_digest_holds_one_tensor_at_a_time_whatever_the_layout(world, ranks, monkeypatch, name):
    model = open_model(world / "moe" / name[1])
    pieces = {}
    for key, tensor in model.tensors.items():
        pieces[key] = tensor.read()
    expected = model_digest(lazy_model(model.card, pieces))
    alive: dict[int, int] = {}
    most = 0
    real = megatron._read_canonical

    def counted(shape, dtype, sources):
        nonlocal most
        result = real(shape, dtype, sources)
        alive[id(result)] = result.numel()
        weakref.finalize(result, alive.pop, id(result))
        most = max(most, sum(alive.values()))
        return result

    monkeypatch.setattr(megatron, "_read_canonical", counted)
    assert model_digest(open_model(world / "moe" / name[1])) == expected
    assert 0 < most <= 2 * max(tensor.numel() for tensor in pieces.values())
