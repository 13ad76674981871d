"""The plan as a whole: which layouts it lists, how it counts time, and what it says where nothing fits."""

import time
from dataclasses import replace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from flexolmo_megatron.config.layout import check_layout
from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.launch.plan import estimate, memory, overrides, plan
from flexolmo_megatron.launch.plan_activations import chunk_activations, in_flight, peak_activations
from flexolmo_megatron.launch.plan_compute import chunk_flops
from flexolmo_megatron.launch.plan_hardware import Hardware
from flexolmo_megatron.launch.plan_inference import plan_inference
from flexolmo_megatron.launch.plan_state import state
from flexolmo_megatron.launch.plan_traffic import microbatch_traffic, step_traffic
from flexolmo_megatron.launch.plan_work import Layout, Work, chunks, layouts, work_of
from flexolmo_megatron.training.flops import mixture_products, pair_flops, total

HARDWARE = Hardware(1000, 3000, 400, 50, gpus_per_node=8, share=0.5)


def _work(mode: str, backend: str = "te", *options: str) -> Work:
    preset = "7b-pair" if mode in ("expert", "anchor", "dense") else "37b"
    config = load_config(TrainConfig, preset=preset, overrides=["out=x", "data.train=[]", *options])
    return work_of(config, mode, backend)


def test_work_is_what_the_run_builds():
    narrow = _work("expert", "te", "expert.ffn_hidden_size=2048", "expert.bias=false")
    assert (narrow.model.num_experts, narrow.model.ffn_hidden_size, narrow.anchor_ffn) == (2, 2048, 11008)
    assert not narrow.model.router_bias
    assert _work("anchor").model.num_experts == 0
    with pytest.raises(FlexOlmoError, match=r"model.num_experts = 0: expected 2 or more for --mode moe"):
        work_of(load_config(TrainConfig, preset="7b-pair", overrides=["out=x", "data.train=[]"]), "moe", "te")
    with pytest.raises(FlexOlmoError, match=r"expert.ffn_hidden_size = 99999: expected 1 to model.ffn_hidden_size"):
        _work("expert", "te", "expert.ffn_hidden_size=99999")


@pytest.mark.parametrize(("mode", "world", "batch"), [("expert", 64, 1024), ("moe", 96, 960), ("moe", 1024, 1024)])
def test_every_listed_layout_can_start(mode, world, batch):
    work = _work(mode, "te", f"global_batch_size={batch}")
    found = list(layouts(work, world, 8))
    assert len(found) == len(set(found)) > 20
    for layout in found:
        check_layout(work.model, work.kind, layout.parallel(), world_size=world, seq_length=work.sequence,
                     microbatches=layout.microbatches(work))  # fmt: skip
        assert layout.microbatches(work) * layout.micro_batch * layout.data == work.batch
        assert layout.tensor * layout.pipeline * layout.context * layout.data == world
        assert layout.tensor <= 8
    assert any(layout.virtual > 1 for layout in found) and any(layout.context > 1 for layout in found)
    assert (mode == "moe") == any(layout.expert == 8 for layout in found)
    assert all(layout.context == 1 for layout in layouts(_work(mode, "local"), world, 8))


def test_options_give_the_layout_to_train():
    layout = Layout(64, tensor=2, pipeline=2, virtual=4, expert=8, expert_tensor=1, micro_batch=2)
    config = load_config(TrainConfig, preset="37b", overrides=["out=x", "data.train=[]", *overrides(layout)])
    assert config.parallel == layout.parallel() and config.parallel.sequence
    assert config.micro_batch_size == 2 and config.optimizer.use_distributed_optimizer


class _Pipe:
    """What get_pp_rank_microbatches asks of Megatron's communicator."""

    def __init__(self, layout: Layout, stage: int) -> None:
        self.pp_group = self
        self.size, self.rank = (lambda: layout.pipeline), (lambda: stage)
        self.virtual_pipeline_model_parallel_size = layout.virtual if layout.virtual > 1 else None


@pytest.mark.parametrize("layout", [Layout(8, pipeline=8), Layout(8, pipeline=4, virtual=4), Layout(512, pipeline=8)])
def test_microbatches_in_flight_are_megatrons(layout):
    work = _work("expert", "te", "global_batch_size=256")
    for stage in range(layout.pipeline):
        _, _, warm_up, rest = get_pp_rank_microbatches(
            layout.microbatches(work), layout.virtual, layout.pipeline, p2p_communicator=_Pipe(layout, stage)
        )
        # One more forward pass comes before the first backward pass, unless all are in the warm-up.
        assert in_flight(work, layout, stage) == warm_up + (rest > 0)


def test_flops_are_those_of_the_step():
    work = _work("expert", "te", "model.num_layers=4", "global_batch_size=8")
    whole = chunk_flops(work, Layout(1), chunks(work, Layout(1), 0)[0])
    assert 8 * whole == pytest.approx(pair_flops(work.model, 8, 4096), rel=1e-12)
    # By hand, in multiply-adds per token: the two share their formulas. Forward and backward through a layer: of the
    # weights of attention and anchor the input's gradients, of expert and router the weights' too; half of 4097 keys.
    projections, one_ffn, router, scores = 4 * 4096**2, 3 * 4096 * 11008, 2 * 4096, 2 * 4097 / 2 * 4096
    upper = 2 * projections + (2 + 3) * one_ffn + 3 * router + 3.5 * scores
    # In the first layer no input has a gradient but that of the expert's output matrix.
    first = projections + (1 + 2 + 1 / 3) * one_ffn + 2 * router + scores
    assert whole == pytest.approx(2 * 4096 * (3 * upper + first + 2 * 4096 * 100352), rel=1e-12)
    layout = Layout(8, tensor=2, pipeline=2, virtual=2, micro_batch=2)
    parts = sum(chunk_flops(work, layout, c) for stage in range(2) for c in chunks(work, layout, stage))
    assert 2 * parts == pytest.approx(2 * whole, rel=1e-12)  # two tensor-parallel processes, two samples
    mixture = _work("moe", "te", "model.num_layers=4")
    dense = _work("anchor", "te", "model.num_layers=4")
    flops = [chunk_flops(w, Layout(1), chunks(w, Layout(1), 0)[0]) for w in (mixture, dense)]
    ffn = 4096 * 3 * 6 * 4096 * 11008
    products = total(mixture_products(mixture.model, 4096))
    assert flops[0] - flops[1] == pytest.approx(4 * (products - ffn), rel=1e-12)
    assert products == 4096 * 3 * (4 * 6 * 4096 * 11008 + 2 * 8 * 4096)  # four experts and eight rows


def test_router_tuning_passes_gradients_through_everything_above_the_first_router():
    router, moe = _work("router"), _work("moe")
    layout = Layout(64, expert=8)
    [chunk] = chunks(router, layout, 0)
    held = state(router, layout, 0)
    assert held.trained == 32 * 8 * 4096 and held.gradients < 1e7 < held.weights
    assert state(moe, layout, 0).weights == pytest.approx(held.weights, rel=1e-6)
    # Forward and the gradients of inputs, but not of weights: a little less than two thirds of joint training.
    share = chunk_flops(router, layout, chunk) / chunk_flops(moe, layout, chunk)
    assert 0.6 < share < 2 / 3 + 0.05
    assert chunk_activations(router, layout, chunk) > 0.4 * chunk_activations(moe, layout, chunk)


def test_traffic_by_hand():
    work = _work("moe")
    layout = Layout(64, expert=8)
    sent = microbatch_traffic(work, layout, 0, HARDWARE).sent
    # Out and back, forward and backward; four copies of 4096 tokens of 4096 numbers of 2 bytes; 7 of 8 leave.
    assert sent["expert"] == 32 * 4 * 4 * 4096 * 4096 * 2 * 7 / 8
    held = state(work, layout, 0)
    experts, rest = 32 * 3 * 4096 * 11008, held.trained - 32 * 3 * 4096 * 11008
    assert held.experts == experts
    data = step_traffic(work, layout, held, HARDWARE).sent["data"]
    assert data == pytest.approx(6 * (rest * 63 / 64 + experts * 7 / 8))  # 4 bytes of gradient, 2 of weight
    assert step_traffic(work, replace(layout, distributed=False), held, HARDWARE).sent["data"] == pytest.approx(
        8 * (rest * 63 / 64 + experts * 7 / 8)
    )
    piped = Layout(64, tensor=2, pipeline=4, virtual=2, expert=2)
    rows = 4096 * 4096 * 2 / 2
    # Each process has two chunks: both pass their output on and their input's gradient back, except at the ends.
    assert [microbatch_traffic(work, piped, s, HARDWARE).sent["pipeline"] / rows for s in (0, 1, 3)] == [3, 4, 3]


def test_bandwidths():
    assert HARDWARE.ring_seconds(400e9, 8, 1) == 1
    assert HARDWARE.ring_seconds(50e9, 8, 8) == 1  # one member on each node
    assert HARDWARE.ring_seconds(100e9, 8, 4) == 1  # two members share a node, so two ports
    assert HARDWARE.ring_seconds(400e9, 128, 1) == 1  # eight ports are as fast as the links within
    assert HARDWARE.exchange_seconds(15e9, 16, 1) == pytest.approx(8e9 / 50e9)  # 8 of 15 parts leave the node
    assert HARDWARE.ring_seconds(1e9, 1, 1) == HARDWARE.exchange_seconds(1e9, 1, 1) == 0


def test_time_is_the_sum_of_its_parts():
    work, layout = _work("moe"), Layout(64, pipeline=4, virtual=2, expert=8)
    result = estimate(work, layout, HARDWARE, memory(work, layout))
    assert result.microbatches == 64
    one = result.compute_seconds + sum(v for k, v in result.traffic_seconds.items() if k != "data")
    assert result.bubble_seconds == pytest.approx(3 / 2 * one / 64)
    assert result.bubble_share == pytest.approx(1.5 / (64 + 1.5))
    parts = result.compute_seconds + result.bubble_seconds + sum(result.traffic_seconds.values())
    assert result.seconds == pytest.approx(parts + result.optimizer_seconds)
    assert result.days(50e9) == pytest.approx(50e9 / (1024 * 4096) * result.seconds / 86400)
    # All of the step's needed operations at the share of the peak, were nothing to be waited for.
    assert result.peak_share < 0.5
    free = replace(HARDWARE, intra_bandwidth=1e12, inter_bandwidth=1e12, memory_bandwidth=1e12)
    alone = Layout(64, tensor=8, expert=8)
    assert estimate(work, alone, free, memory(work, alone)).peak_share == pytest.approx(0.5)


def test_the_37b_plan():
    found = plan(_work("moe"), HARDWARE, 64, 72e9)
    assert [result.seconds for result in found] == sorted(result.seconds for result in found)
    assert len({result.layout.groups for result in found}) == len(found) > 10
    for result in found:
        assert result.worst.total <= 72e9
        assert all(0 <= stage.stage < result.layout.pipeline for stage in result.stages)
    every = [
        candidate
        for layout in layouts(_work("moe"), 64, 8)
        if layout.groups == found[0].layout.groups
        for stages in [memory(_work("moe"), layout)]
        if max(stage.total for stage in stages) <= 72e9
        for candidate in [estimate(_work("moe"), layout, HARDWARE, stages)]
    ]
    assert found[0].seconds == min(candidate.seconds for candidate in every)


def test_first_second_and_last_stage_need_the_most():
    work, layout = _work("moe"), Layout(64, pipeline=8, virtual=2, expert=8)
    needs = [state(work, layout, s).total + peak_activations(work, layout, s).total for s in range(8)]
    assert max(needs) == max(stage.total for stage in memory(work, layout))


def test_an_owners_run_fits_where_joint_training_does_not():
    assert plan(_work("expert"), HARDWARE, 8, 72e9)
    with pytest.raises(FlexOlmoError, match=r"no layout of 8 GPUs fits: the smallest \(TP \d.*\) needs \d+\.\d GB"):
        plan(_work("moe"), HARDWARE, 8, 72e9)
    with pytest.raises(FlexOlmoError, match=r"no layout of 7 GPUs can run this: .*global_batch_size = 1024"):
        plan(_work("expert"), HARDWARE, 7, 72e9)


def test_1024_gpus_within_ten_seconds():
    began = time.process_time()
    assert plan(_work("moe"), HARDWARE, 1024, 72e9)
    assert time.process_time() - began < 10


def test_inference():
    work = _work("inference")
    found = plan_inference(work, HARDWARE, 8, 72e9)
    assert [s.together for s in found] == sorted((s.together for s in found), reverse=True)
    by = {(serving.tensor, serving.expert): serving for serving in found}
    assert (1, 1) not in by  # 75 GB of weights
    one = by[8, 1]
    held = state(work, Layout(8, tensor=8), 0)
    assert one.weights == held.weights and held.gradients == held.optimizer == 0
    assert one.cache_per_token == 2 * 32 * 4096 / 8 * 2  # keys and values of 32 layers, an eighth of 4096, bf16
    assert one.sequences == int((72e9 - one.weights) / (one.cache_per_token * 4096))
    # One sequence reads the active weights without the embedding, and the cache of half a sequence.
    active = 32 * (4 * 3 * 4096 * 11008 + 4 * 4096**2) + 100352 * 4096
    assert 1 / one.alone == pytest.approx((active * 2 / 8 + one.cache_per_token * 2048) / 3e12, rel=1e-3)
    assert one.prefill == pytest.approx(8 * 0.5e15 / (2 * active + 2 * 32 * 4096 * 4096), rel=1e-3)
    with pytest.raises(FlexOlmoError, match=r"does not fit: the smallest layout needs 77\.3 GB per GPU, of which 72"):
        plan_inference(work, HARDWARE, 1, 72e9)
