"""The count of operations: against sums done by hand, and against what a step launches in torch's profile."""

from collections import Counter

import pytest
import torch

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.runtime.setup import initialize
from flexolmo_megatron.training import gemms
from flexolmo_megatron.training.flops import attention_flops, mixture_products, pair_flops, pair_products, total
from flexolmo_megatron.training.gemms import GemmCount, count_gemms, is_product

SMALL = ModelConfig(num_layers=3, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
                    vocab_size=50, max_position_embeddings=16, num_experts=2, top_k=2)
SEVEN = ModelConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32,
                    num_query_groups=32, vocab_size=100352, max_position_embeddings=4096, num_experts=2, top_k=2)


def test_a_pair_step_at_7b_by_hand():
    # Per token and layer, in multiply-adds: attention's projections 4 * 4096^2, one FFN 3 * 4096 * 11008,
    # the router 2 * 4096, the head 4096 * 100352.
    projections, one_ffn, router, head = 67_108_864, 135_266_304, 8_192, 411_041_792
    forward = projections + 2 * one_ffn + router
    backward = projections + one_ffn + 2 * one_ffn + 2 * router  # inputs of all, weights of the expert and the router
    # Of the first layer: the expert's two weight gradients, what passes between them, and the router's weight gradient.
    first = one_ffn + 4096 * 11008 + router
    per_token = 2 * (32 * forward + 31 * backward + first + 2 * head)
    assert total(pair_products(SEVEN, 1)) == per_token
    assert total(pair_products(SEVEN, 8192)) == 8192 * per_token
    # Causal attention over 4096 tokens: per layer, 4096 * 4097 / 2 pairs, 4096 wide, 2 products of 2 operations.
    scores = 4096 * 4097 // 2 * 4096 * 2 * 2
    assert attention_flops(SEVEN, 1, 4096, 1, backward=False) == scores
    assert pair_flops(SEVEN, 2, 4096) == 8192 * per_token + 2 * (32 * scores + 31 * scores * 5 // 2)


def test_a_merged_layer_by_hand():
    model = ModelConfig(**{**vars(SEVEN), "num_experts": 8, "top_k": 4})
    assert total(mixture_products(model, 10)) == 2 * 10 * 3 * (4 * 135_266_304 + 8 * 4096)


def test_a_narrow_pair_has_grouped_queries():
    products = {product.name: product for product in pair_products(SMALL, 10)}
    assert (products["layers.1.qkv forward"].inner, products["layers.1.qkv forward"].columns) == (24, (4 + 2 * 2) * 6)
    assert "layers.0.qkv input" not in products and "layers.0.expert.fc1 input" not in products
    assert {"layers.0.expert.fc2 input", "layers.0.expert.fc1 weight", "layers.1.anchor.fc1 input"} <= products.keys()
    assert not [name for name in products if "weight" in name and "expert" not in name and "router" not in name]


def _profile(frozen: bool):
    from flexolmo_megatron.model.builder import build_model
    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.training.freezing import freeze_anchor

    initialize()
    model = build_model(SMALL, "pair", transformer_config(SMALL, "pair"))
    if frozen:
        freeze_anchor(model)
    tokens = torch.randint(50, (2, 9))
    positions = torch.arange(8).expand(2, 8)

    def step():
        model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()).mean().backward()

    step()
    return count_gemms(step)


def _sizes(products) -> Counter:
    """Products by their three sizes: a transposed one, (a b)^T, is the same work."""
    return Counter(tuple(sorted((p.rows, p.inner, p.columns))) for p in products)


def test_an_owner_s_step_launches_the_products_that_it_needs_and_no_weight_gradient_of_a_frozen_weight():
    counted = _profile(frozen=True)
    needed = pair_products(SMALL, 16)
    # Upstream's router computes the input's gradient also where nobody needs it: in the first layer.
    like = ("layers.1.router input",)
    not_needed = [product for product in needed if product.name in like]
    expected = needed + not_needed
    forward, head, inputs, weights, between = 3 * 7, 2, 2 * 7, 3 * 3, 1
    assert counted.calls == len(expected) == forward + head + inputs + weights + between + len(not_needed)
    launched = Counter()
    for name, count in counted.names.items():
        launched[tuple(sorted(map(int, name.split(" x "))))] += count
    assert launched == _sizes(expected)
    assert counted.flops == total(expected)


def test_a_step_without_freezing_launches_the_weight_gradients_too():
    # Per layer those of two projections and the anchor's two matrices, that of the head, and the first layer's inputs.
    assert _profile(frozen=False).calls == _profile(frozen=True).calls + 3 * 4 + 1 + 5


@pytest.mark.parametrize(("kernel", "product"), [
    ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", True),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x256x64_warpgroupsize2x1x1_kernel", True),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(...)", True),
    ("void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4>(...)", True),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(...)", False),
    ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", False),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i_128x128x128", False),
    ("void transformer_engine::cast_transpose_fused_kernel<...>", False),
    ("void at::native::vectorized_elementwise_kernel<4, ...>", False),
])
def test_which_kernels_are_products(kernel, product):
    assert is_product(kernel) == product


def test_kernels_of_a_gpu_are_counted(monkeypatch):
    from contextlib import nullcontext
    from types import SimpleNamespace

    from torch.autograd import DeviceType

    def event(name, device):
        # As the profiler hands it out: equal to the type's member, but another object.
        return SimpleNamespace(name=name, device_type=DeviceType(device.value))

    events = [event("nvjet_x", DeviceType.CUDA), event("copy", DeviceType.CUDA), event("aten::mm gemm", DeviceType.CPU)]
    recorded = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(gemms, "profile", lambda **options: nullcontext(recorded))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert count_gemms(lambda: None) == GemmCount(1, {"nvjet_x": 1}, None)
