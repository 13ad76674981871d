"""Tokens and FLOPs of runs, against independent counts."""

from dataclasses import replace

from flexolmo_megatron.compare.budget import run_flops, run_tokens, step_flops
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.training.flops import pair_flops

MODEL = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, num_query_groups=2,
                    vocab_size=11, max_position_embeddings=16)


def configured() -> TrainConfig:
    config = TrainConfig(out=".", train_iters=3, global_batch_size=4, micro_batch_size=2)
    config.data.seq_length = 16
    return config


def test_tokens() -> None:
    assert run_tokens(configured()) == 3 * 4 * 16


def test_owners_step_is_that_of_training_flops() -> None:
    assert step_flops("expert", MODEL, configured()) == pair_flops(MODEL, 4, 16)


def test_the_divergence_from_the_anchor_costs_its_forward_pass_on_public_sequences() -> None:
    config = configured()
    config.data.public_share, config.expert.anchor_kl_coeff = 0.25, 1.0
    tokens, h, f, v = 16, 8, 12, 11  # one sequence of the four
    forward = 2 * tokens * (2 * (4 * h * h + 3 * h * f) + v * h) + 2 * 2 * 16 * 17 * h
    assert step_flops("expert", MODEL, config) == pair_flops(MODEL, 4, 16) + forward


def test_dense_step_by_hand() -> None:
    tokens, h, f, v = 64, 8, 12, 11
    # Forward, input and weight gradient of each matrix; the embedding has no product, so the first layer's qkv and fc1
    # need an input gradient all the same: the embedding trains.
    matrices = 2 * (4 * h * h + 3 * h * f) + v * h
    attention = 4 * 16 * 17 * h  # sequences x positions over the causal half x width, once for scores or values
    assert step_flops("dense", MODEL, configured()) == 6 * tokens * matrices + 2 * (2 + 5) * attention


def test_mixture_step_counts_active_experts_alone() -> None:
    config, mixture = configured(), replace(MODEL, num_experts=3, top_k=2)
    dense = step_flops("dense", MODEL, config)
    ffn, router = 2 * 6 * 64 * 3 * 8 * 12, 2 * 6 * 64 * 8 * 3
    assert step_flops("moe", mixture, config) == dense + ffn + router
    assert step_flops("moe", replace(mixture, num_experts=9), config) == dense + ffn + 3 * router


def test_an_uncoordinated_run_is_a_dense_one() -> None:
    config = configured()
    config.expert.coordination = False
    assert run_flops("expert", MODEL, config) == 3 * step_flops("dense", MODEL, config)
