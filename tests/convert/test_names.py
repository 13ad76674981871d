import pytest
import torch

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.names import (
    check_tensors,
    expected_tensors,
    fill_region,
    megatron_tensors,
    pieces_in,
    whole,
)
from flexolmo_megatron.errors import FlexOlmoError

from .conftest import lazy_model

CONFIG = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=6, num_attention_heads=4, num_query_groups=2,
                     vocab_size=10, num_experts=2, top_k=1, router_bias=True)


def numbers(model, name):
    return model.tensors[name].read()


def test_expected_tensors_of_a_pair_are_only_what_its_owner_trained():
    prefix = "model.layers.0.mlp."
    assert expected_tensors(CONFIG, "pair") == {
        prefix + "gate.weight": (1, 8), prefix + "gate.bias": (1,), prefix + "experts.1.gate_proj.weight": (6, 8),
        prefix + "experts.1.up_proj.weight": (6, 8), prefix + "experts.1.down_proj.weight": (8, 6)}


def test_expected_tensors_have_the_shapes_of_grouped_query_attention_and_of_the_router():
    shapes = expected_tensors(CONFIG, "moe")
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (8, 8)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (4, 8)
    assert shapes["model.layers.0.self_attn.v_proj.weight"] == (4, 8)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (8,)
    assert shapes["model.layers.0.self_attn.k_norm.weight"] == (4,)
    assert shapes["model.layers.0.mlp.gate.weight"] == (2, 8)
    assert shapes["model.layers.0.mlp.gate.bias"] == (2,)
    assert len(shapes) == 3 + 8 + 2 + 2 * 3


def test_bias_is_expected_only_where_the_router_has_one():
    assert "model.layers.0.mlp.gate.bias" not in expected_tensors(ModelConfig(num_experts=1, top_k=1), "moe")


def test_megatron_shapes():
    shapes = {key: tensor.shape for key, tensor in megatron_tensors(CONFIG, "moe").items()}
    assert shapes["decoder.layers.0.self_attention.linear_qkv.weight"] == (16, 8)
    assert shapes["decoder.layers.0.mlp.experts.experts.linear_fc1.weight"] == (2, 12, 8)
    assert shapes["decoder.layers.0.mlp.experts.experts.linear_fc2.weight"] == (2, 8, 6)
    pair = {key: tensor.shape for key, tensor in megatron_tensors(CONFIG, "pair").items()}
    assert pair == {"decoder.layers.0.mlp.router.row": (1, 8), "decoder.layers.0.mlp.router.bias": (1,),
                    "decoder.layers.0.mlp.expert.linear_fc1.weight": (12, 8),
                    "decoder.layers.0.mlp.expert.linear_fc2.weight": (8, 6)}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_qkv_is_interleaved_by_group_as_megatron_splits_it(groups):
    model = lazy_model("dense", num_query_groups=groups, num_layers=1)
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    tensor = megatron_tensors(model.card.model, "dense")[key]
    fused = fill_region(tensor, (0, 0), tensor.shape, model.tensors)
    # Megatron's Attention views the output as [groups, (heads per group + 2) * head size] and splits q, k, v from it.
    heads = 4 // groups
    q, k, v = fused.view(groups, (heads + 2) * 8, 32).split([heads * 8, 8, 8], dim=1)
    attention = "model.layers.0.self_attn."
    assert torch.equal(q.reshape(32, 32), numbers(model, attention + "q_proj.weight"))
    assert torch.equal(k.reshape(groups * 8, 32), numbers(model, attention + "k_proj.weight"))
    assert torch.equal(v.reshape(groups * 8, 32), numbers(model, attention + "v_proj.weight"))


def test_any_region_of_any_tensor_equals_the_same_part_of_the_whole():
    model = lazy_model("moe", router_bias=True)
    generator = torch.Generator().manual_seed(1)
    for tensor in megatron_tensors(model.card.model, "moe").values():
        full = fill_region(tensor, (0,) * len(tensor.shape), tensor.shape, model.tensors)
        assert tuple(full.shape) == tensor.shape
        for _ in range(5):
            first = [int(torch.randint(size, (1,), generator=generator)) for size in tensor.shape]
            sizes = [int(torch.randint(1, size - start + 1, (1,), generator=generator))
                     for start, size in zip(first, tensor.shape, strict=True)]
            part = fill_region(tensor, tuple(first), tuple(sizes), model.tensors)
            expected = full[tuple(slice(start, start + size) for start, size in zip(first, sizes, strict=True))]
            assert torch.equal(part, expected), (tensor.key, first, sizes)


def test_expert_tensors_are_gate_above_up_for_each_expert():
    model = lazy_model("moe")
    tensor = megatron_tensors(model.card.model, "moe")["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
    second = fill_region(tensor, (1, 0, 0), (1, 48, 32), model.tensors)[0]
    assert torch.equal(second[:24], numbers(model, "model.layers.1.mlp.experts.1.gate_proj.weight"))
    assert torch.equal(second[24:], numbers(model, "model.layers.1.mlp.experts.1.up_proj.weight"))


def test_pieces_in_names_the_canonical_tensors_of_a_tensor_parallel_part():
    tensor = megatron_tensors(CONFIG, "pair")["decoder.layers.0.mlp.expert.linear_fc1.weight"]
    assert pieces_in(tensor, ((3, 9), (0, 8))) == [
        ("model.layers.0.mlp.experts.1.gate_proj.weight", ((3, 6), (0, 8)), ((3, 6), (0, 8))),
        ("model.layers.0.mlp.experts.1.up_proj.weight", ((0, 3), (0, 8)), ((6, 9), (0, 8)))]


def test_stored_chunks_are_disjoint_and_cover_the_tensor():
    for kind in ("moe", "pair"):
        for tensor in megatron_tensors(CONFIG, kind).values():
            covered = torch.zeros(tensor.shape, dtype=torch.int)
            for box in tensor.chunks:
                covered[tuple(slice(*edge) for edge in box)] += 1
            assert bool((covered == 1).all()), tensor.key
    fc1 = megatron_tensors(CONFIG, "moe")["decoder.layers.0.mlp.experts.experts.linear_fc1.weight"]
    assert fc1.chunks[0] == ((0, 1), (0, 6), (0, 8)) and len(fc1.chunks) == 4
    qkv = megatron_tensors(CONFIG, "moe")["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert qkv.chunks == (whole((16, 8)),)


def test_fill_region_converts_only_when_told_and_refuses_mixed_dtypes():
    model = lazy_model("dense")
    half = lazy_model("dense", dtype=torch.bfloat16)
    tensor = megatron_tensors(model.card.model, "dense")["decoder.layers.0.mlp.linear_fc1.weight"]
    mixed = {**model.tensors, "model.layers.0.mlp.up_proj.weight": half.tensors["model.layers.0.mlp.up_proj.weight"]}
    assert fill_region(tensor, (0, 0), (48, 32), mixed, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(FlexOlmoError, match="gate_proj.weight is torch.float32, .*up_proj.weight is torch.bfloat16: "
                                            "expected one dtype, because they form one Megatron tensor"):
        fill_region(tensor, (0, 0), (48, 32), mixed)


def test_fill_region_outside_the_tensor():
    model = lazy_model("dense")
    tensor = megatron_tensors(model.card.model, "dense")["output_layer.weight"]
    with pytest.raises(FlexOlmoError, match=r"region at \[40, 0\] of shape \[20, 32\] does not lie in the tensor's "
                                            r"shape \[53, 32\]"):
        fill_region(tensor, (40, 0), (20, 32), model.tensors)
    with pytest.raises(FlexOlmoError, match="tensor lm_head.weight is missing: expected it for output_layer.weight"):
        fill_region(tensor, (0, 0), (53, 32), {})


def test_check_tensors_names_the_tensor_its_shape_and_the_expected_one():
    model = lazy_model("dense")
    expected = expected_tensors(model.card.model, "dense")
    check_tensors(model.tensors, expected, "x")
    some = dict(model.tensors)
    norm = some.pop("model.norm.weight")
    with pytest.raises(FlexOlmoError, match=r"x: tensor model.norm.weight is missing: expected shape \[32\]"):
        check_tensors(some, expected, "x")
    with pytest.raises(FlexOlmoError, match=r"x: unexpected tensor model.norm.bias of shape \[32\]"):
        check_tensors({**model.tensors, "model.norm.bias": norm}, expected, "x")
    with pytest.raises(FlexOlmoError, match=r"x: tensor lm_head.weight has shape \[32\]: expected \[53, 32\]"):
        check_tensors({**model.tensors, "lm_head.weight": norm}, expected, "x")


def test_kinds():
    with pytest.raises(FlexOlmoError, match="checkpoint kind 'sparse': expected one of dense, moe, pair"):
        expected_tensors(CONFIG, "sparse")
    with pytest.raises(FlexOlmoError, match="a moe checkpoint with model.num_experts = 0: expected 1 or more"):
        expected_tensors(ModelConfig(), "moe")
