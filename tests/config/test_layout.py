"""Layouts that cannot work are refused with the numbers, and those that can are not."""

from dataclasses import replace

import pytest

from flexolmo_megatron.config.layout import check_layout, data_parallel_size, layout_problem
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import ParallelConfig
from flexolmo_megatron.errors import FlexOlmoError

DENSE = ModelConfig(num_layers=8, hidden_size=48, ffn_hidden_size=96, num_attention_heads=12, num_query_groups=6,
                    vocab_size=264, max_position_embeddings=64)
MOE = replace(DENSE, num_experts=6, top_k=2)
PAIR = replace(DENSE, num_experts=2, top_k=2, ffn_hidden_size=36)
MODELS = {"dense": DENSE, "moe": MOE, "pair": PAIR}


def problem(kind, processes, *, seq_length=48, microbatches=8, anchor=None, model=None, **parallel):
    return layout_problem(model or MODELS[kind], kind, ParallelConfig(**parallel), world_size=processes,
                          seq_length=seq_length, microbatches=microbatches, anchor_ffn_hidden_size=anchor)


@pytest.mark.parametrize(("kind", "processes", "options", "message"), [
    ("dense", 6, dict(tensor=4), "parallel.tensor = 4 times parallel.pipeline = 1 does not divide the number of "
                                 "processes, 6"),
    ("dense", 6, dict(tensor=2, pipeline=1, context=2), "times parallel.context = 2 does not divide the number of "
                                                        "processes, 6"),
    ("dense", 4, dict(tensor=0), "parallel.tensor = 0: expected at least 1"),
    ("dense", 4, dict(virtual_pipeline=0), "parallel.virtual_pipeline = 0: expected at least 1"),
    ("moe", 4, dict(expert_tensor=0), "parallel.expert_tensor = 0: expected at least 1"),
    ("dense", 3, dict(pipeline=3), "parallel.pipeline = 3 does not divide model.num_layers = 8"),
    ("dense", 4, dict(pipeline=4, virtual_pipeline=4), "parallel.pipeline = 4 times parallel.virtual_pipeline = 4 does "
                                                       "not divide model.num_layers = 8"),
    ("dense", 2, dict(virtual_pipeline=2), "parallel.virtual_pipeline = 2 with parallel.pipeline = 1: virtual stages "
                                           "need parallel.pipeline above 1"),
    ("dense", 2, dict(pipeline=2, virtual_pipeline=2, microbatches=3),
     "parallel.virtual_pipeline = 2 needs a number of microbatches that parallel.pipeline = 2 divides, but "
     "global_batch_size / (micro_batch_size * data-parallel processes) = 3"),
    ("dense", 8, dict(tensor=8), "model.num_attention_heads = 12 cannot be split over parallel.tensor = 8 processes"),
    ("dense", 4, dict(tensor=4), "model.num_query_groups = 6 cannot be split over parallel.tensor = 4 processes"),
    ("dense", 2, dict(tensor=2, model=replace(DENSE, vocab_size=257)),
     "model.vocab_size = 257 cannot be split over parallel.tensor = 2 processes"),
    ("dense", 2, dict(tensor=2, model=replace(DENSE, ffn_hidden_size=95)),
     "model.ffn_hidden_size = 95 cannot be split over parallel.tensor = 2 processes"),
    ("pair", 2, dict(tensor=2, model=replace(PAIR, ffn_hidden_size=35), anchor=96),
     "expert.ffn_hidden_size = 35 cannot be split over parallel.tensor = 2 processes"),
    ("pair", 2, dict(tensor=2, anchor=95),
     "the anchor's ffn_hidden_size = 95 cannot be split over parallel.tensor = 2 processes"),
    ("moe", 2, dict(tensor=2, expert_tensor=1, sequence=True),
     "parallel.expert_tensor = 1 with parallel.expert = 1: expected no value, or parallel.tensor = 2"),
    ("moe", 2, dict(expert_tensor=2), "parallel.expert_tensor = 2 with parallel.expert = 1: expected no value, or"),
    ("moe", 12, dict(expert=2, expert_tensor=6, model=replace(MOE, ffn_hidden_size=92)),
     "model.ffn_hidden_size = 92 cannot be split over parallel.expert_tensor = 6 processes"),
    ("dense", 2, dict(expert=2), "parallel.expert = 2: expected 1 for a dense model"),
    ("pair", 2, dict(expert=2), "parallel.expert = 2: expected 1 for an owner's pair, which dispatches no tokens"),
    ("pair", 2, dict(expert_tensor=2), "parallel.expert_tensor = 2: expected no value for an owner's pair"),
    ("moe", 4, dict(expert=4), "model.num_experts = 6 cannot be split over parallel.expert = 4 processes"),
    ("moe", 2, dict(expert=3), "parallel.expert = 3 times parallel.expert_tensor = 1 times parallel.pipeline = 1 does "
                               "not divide the number of processes, 2"),
    ("moe", 4, dict(tensor=2, expert=3, sequence=True),
     "parallel.expert = 3 times parallel.expert_tensor = 2 times parallel.pipeline = 1 does not divide the number of "
     "processes, 4"),
    ("moe", 2, dict(moe_token_dispatcher_type="flex"),
     "parallel.moe_token_dispatcher_type = 'flex': expected one of alltoall, allgather"),
    ("moe", 2, dict(tensor=2), "parallel.tensor = 2 for a mixture: Megatron trains one only with "
                               "parallel.sequence=true then"),
    ("dense", 2, dict(sequence=True), "parallel.sequence = true: expected parallel.tensor above 1"),
    ("dense", 2, dict(tensor=2, sequence=True, seq_length=47), "data.seq_length = 47 cannot be split over "
                                                               "parallel.tensor = 2 processes"),
    ("dense", 2, dict(context=2, seq_length=46),
     "data.seq_length = 46: expected a multiple of 2 * parallel.context = 4"),
    ("dense", 12, dict(context=2, tensor=6, sequence=True, seq_length=32),
     "data.seq_length = 32 / parallel.context = 16 cannot be split over parallel.tensor = 6 processes"),
])
def test_refused(kind, processes, options, message):
    assert message in problem(kind, processes, **options)


@pytest.mark.parametrize(("kind", "processes", "options"), [
    ("dense", 1, {}), ("dense", 8, dict(tensor=2, pipeline=2)), ("pair", 12, dict(tensor=6, sequence=True, anchor=96)),
    ("dense", 8, dict(pipeline=4, virtual_pipeline=2)), ("pair", 8, dict(context=2, tensor=2, pipeline=2, anchor=96)),
    ("moe", 6, dict(expert=6)), ("moe", 12, dict(tensor=2, expert=6, sequence=True)),
    ("moe", 2, dict(tensor=2, expert_tensor=2, sequence=True)),
    ("moe", 6, dict(tensor=2, expert=6, expert_tensor=1, sequence=True)),
    ("moe", 12, dict(expert=3, pipeline=2, virtual_pipeline=2, moe_token_dispatcher_type="allgather")),
])
def test_allowed(kind, processes, options):
    assert problem(kind, processes, **options) is None


def test_check_raises_what_the_problem_says():
    with pytest.raises(FlexOlmoError, match="parallel.pipeline = 3 does not divide model.num_layers = 8"):
        check_layout(DENSE, "dense", ParallelConfig(pipeline=3), world_size=3, seq_length=48, microbatches=8)


def test_data_parallel_size():
    assert data_parallel_size(ParallelConfig(tensor=2, pipeline=3, context=2, expert=2), 24) == 2
    with pytest.raises(FlexOlmoError, match="does not divide the number of processes, 25"):
        data_parallel_size(ParallelConfig(tensor=2), 25)
