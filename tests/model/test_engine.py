"""What this package hands to Transformer Engine, against a stand-in that computes on the CPU (tests/model/engine).

Each test runs in a process of its own: whether Transformer Engine exists is decided when Megatron is imported.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.random_models import SIZES, random_model, tensors_of

ENGINE = str(Path(__file__).parent / "engine")
ANCHOR_FFN, OWN_FFN, VOCABULARY = 64, 48, 258
RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]


def _engine(tensor=1):
    """Import Megatron with the stand-in; returns Megatron's provider of its modules."""
    sys.path.insert(0, ENGINE)
    from flexolmo_megatron.runtime.setup import initialize, prepare

    prepare()
    initialize(tensor_parallel=tensor)
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _build(kind, model, backend, **settings):
    from flexolmo_megatron.model.builder import block_spec, build_model
    from flexolmo_megatron.model.config import transformer_config

    config = transformer_config(model, kind, **settings)
    return build_model(model, kind, config, spec=block_spec(kind, config, backend))


def _pair(backend, **settings):
    """A frozen pair whose anchor is wider than the owner's expert, so that their weights differ in shape."""
    from flexolmo_megatron.model.weights import load_anchor, load_weights
    from flexolmo_megatron.training.freezing import freeze_anchor

    sizes = replace(SIZES, vocab_size=VOCABULARY)
    anchor = random_model("moe", 1, 1, sizes=replace(sizes, ffn_hidden_size=ANCHOR_FFN))
    own = random_model("pair", 2, 2, seed=1, bias=True, sizes=replace(sizes, ffn_hidden_size=OWN_FFN))
    pair = _build("pair", own.card.model, backend, anchor_ffn_hidden_size=ANCHOR_FFN, **settings)
    load_anchor(pair, anchor)
    load_weights(pair, own)
    freeze_anchor(pair)
    return pair


def _wrapped(model):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def _loss(model, seed=0, sequences=3):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SIZES.vocab_size, (sequences, 17), generator=generator)
    positions = torch.arange(16).expand(sequences, 16)
    return model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()).mean()


def _sharded(model):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found = {}
    for entry in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if isinstance(part, ShardedTensor):
                found[part.key, tuple(part.global_offset)] = tuple(part.global_shape), part.dtype
    return found


def _compare_tensors():
    backend = _engine()
    from flexolmo_megatron.model.weights import live_model, load_weights

    for kind, experts in (("dense", 0), ("pair", 2), ("moe", 4)):
        source = random_model(kind, experts, min(experts, 2), bias=kind != "dense")
        engine, local = (_build(kind, source.card.model, given) for given in (backend, None))
        assert _sharded(engine) == _sharded(local)
        assert any("_extra_state" in name for name in engine.state_dict())
        load_weights(engine, source) if kind != "pair" else None
        if kind != "pair":
            for name, tensor in tensors_of(live_model(engine, source.card)).items():
                assert tensor.equal(source.tensors[name].read()), name
    grouped = engine.decoder.layers[0].mlp.experts
    return type(grouped).__name__, type(grouped.linear_fc1).__name__


def test_checkpoints_have_the_same_tensors_with_and_without_the_engine():
    assert run_distributed(_compare_tensors, 1) == [("TEGroupedMLP", "TEColumnParallelGroupedLinear")]


def _compare_all_numbers():
    backend = _engine()
    return {kind: _compare_numbers(backend, kind) for kind in ("dense", "pair", "moe")}


def _compare_numbers(backend, kind):
    """Check loss and gradients of both kinds of modules; returns how many tensors have a gradient."""
    from flexolmo_megatron.model.weights import load_weights

    results = []
    for given in (backend, None):
        if kind == "pair":
            model = _pair(given)
        else:
            source = random_model(kind, 4 if kind == "moe" else 0, 2 if kind == "moe" else 0)
            model = _build(kind, source.card.model, given)
            load_weights(model, source)
        loss = _loss(model)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if kind == "moe" and given is None:  # local experts under the grouped modules' names
            grads = {
                f"{name.split('local_experts')[0]}{name.split('.')[-2]}.weight{name.split('.')[-3]}"
                if "local_experts" in name else name: grad for name, grad in grads.items()
            }
        results.append((loss, grads))
    (loss, grads), (expected_loss, expected) = results
    # The same products in fp32, summed in another order.
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        named = partial("{}: {}".format, name)
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-5, msg=named)
    return len(grads)


def test_the_engine_computes_what_the_local_modules_do():
    gradients = {"dense": 3 + 2 * 8, "pair": 2 * 4, "moe": 3 + 2 * (6 + 1 + 8)}
    assert run_distributed(_compare_all_numbers, 1) == [gradients]


def _tensor_parallel(tensor):
    """Losses, and gradients of the router's row, of the engine's pair; checks it against the local one."""
    backend = _engine(tensor)
    found = []
    for sequence in (False, True) if tensor > 1 else (False,):
        layout = dict(tensor_model_parallel_size=tensor, sequence_parallel=sequence)
        engine, local = _pair(backend, **layout), _pair(None, **layout)
        assert _sharded(engine) == _sharded(local)
        norms = [engine.decoder.layers[1].post_mlp_layernorm.weight, engine.decoder.final_layernorm.weight]
        assert all(weight.sequence_parallel is sequence for weight in norms)
        for model in (engine, local):
            _loss(model).backward()
        for (name, ours), theirs in zip(engine.named_parameters(), local.parameters(), strict=True):
            if ours.requires_grad:
                named = partial("{}: {}".format, name)
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5, msg=named)
        found.append(_loss(engine).item())
    return found


def test_tensor_and_sequence_parallel():
    [[alone]], split = run_distributed(_tensor_parallel, 1, 1), run_distributed(_tensor_parallel, 2, 2)
    assert split == [[pytest.approx(alone, rel=1e-5)] * 2] * 2


def _arguments():
    backend = _engine()
    import transformer_engine.pytorch as te

    layer = _pair(backend, dtype=torch.bfloat16).decoder.layers[0]
    norms = [layer.post_self_attn_layernorm, layer.post_mlp_layernorm]
    assert all(isinstance(norm, te.RMSNorm) and norm.eps == 1e-6 for norm in norms)
    modes = {name: module.parallel_mode for name, module in layer.named_modules() if isinstance(module, te.Linear)}
    assert not any(module.fuse_wgrad_accumulation for module in layer.modules() if isinstance(module, te.Linear))
    assert isinstance(layer.self_attention.core_attention, te.DotProductAttention)
    assert type(layer.self_attention.q_layernorm).__name__ == "ProjectionRMSNorm"
    assert {p.dtype for p in layer.parameters() if p.ndim == 2} == {torch.bfloat16}
    return modes


def test_arguments_of_the_engine_s_modules():
    column = {"self_attention.linear_qkv", "mlp.anchor.linear_fc1", "mlp.expert.linear_fc1"}
    row = {"self_attention.linear_proj", "mlp.anchor.linear_fc2", "mlp.expert.linear_fc2"}
    assert run_distributed(_arguments, 1) == [dict.fromkeys(column, "column") | dict.fromkeys(row, "row")]


def _all_steps():
    backend = _engine()
    return {(recipe, drop): _steps(backend, recipe, drop) for recipe in RECIPES for drop in (False, True)}


def _steps(backend, recipe, drop):
    """Three steps in FP8; returns how often each shape of weight was quantised, and checks what must not change."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.quantization import QUANTISED

    from flexolmo_megatron.model.engine import engine_modules, prepare_engine, stored_tensors
    from flexolmo_megatron.model.fp8 import fp8_settings
    from flexolmo_megatron.training.freezing import frozen_fingerprint

    pair = _pair(backend, **fp8_settings(recipe))
    anchor = pair.decoder.layers[0].mlp.anchor.linear_fc1
    exact = anchor.weight.detach().clone()
    wrapped = _wrapped(pair)
    QUANTISED.clear()
    assert prepare_engine(wrapped, recipe, drop) == 2 * 4  # two layers: two projections and the anchor's two matrices
    fingerprint = frozen_fingerprint(wrapped)
    te.RAN.clear()
    losses = []
    for step in range(3):
        wrapped.zero_grad_buffer()
        wrapped.set_is_first_microbatch()
        for microbatch in range(2):
            loss = _loss(wrapped, seed=2 * step + microbatch)
            loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in pair.parameters():
                if parameter.requires_grad:
                    parameter -= 0.1 * parameter.main_grad
    assert frozen_fingerprint(wrapped) == fingerprint
    assert len(te.RAN) == 3 * 2 * 2 * 6 and all(in_fp8 for _, in_fp8 in te.RAN)
    used = anchor.weight if drop else anchor._fp8_workspaces["weight"]
    error = ((used - exact).norm() / exact.norm()).item()
    assert 0 < error < 0.05, error  # E4M3 rounds by at most 2^-4; a scale of 1 would lose the small weights
    assert stored_tensors(anchor.weight)[0].dtype == (torch.float8_e4m3fn if drop else torch.float32)
    assert anchor.weight.allreduce and not anchor.weight.requires_grad  # Megatron's marks are kept
    assert sum(module.fuse_wgrad_accumulation for module in engine_modules(wrapped)) == 2 * 2
    return {shape: QUANTISED.count(shape) for shape in set(QUANTISED)}, losses


@pytest.fixture(scope="module")
def steps():
    return run_distributed(_all_steps, 1)[0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("drop", [False, True])
def test_frozen_weights_are_quantised_once_and_trained_ones_once_per_step(steps, recipe, drop):
    counts, _ = steps[recipe, drop]
    hidden, layers, steps = SIZES.hidden_size, 2, 3
    assert counts[2 * ANCHOR_FFN, hidden] == counts[hidden, ANCHOR_FFN] == layers
    assert counts[2 * OWN_FFN, hidden] == counts[hidden, OWN_FFN] == layers * steps
    assert not any(shape[0] == VOCABULARY for shape in counts), "the head was quantised"
    assert (2, hidden) not in counts, "the router was quantised"


def test_dropping_the_bf16_copies_changes_no_bit(steps):
    for recipe in RECIPES:
        assert steps[recipe, False][1] == steps[recipe, True][1]


def _both_accumulated():
    backend = _engine()
    return [_accumulated(backend, fused) for fused in (True, False)]


def _accumulated(backend, fused):
    from flexolmo_megatron.model.engine import prepare_engine

    pair = _pair(backend)
    wrapped = _wrapped(pair)
    if fused:
        assert prepare_engine(wrapped, None) == 0
    for _ in range(2):
        wrapped.zero_grad_buffer()
        for microbatch in range(2):
            _loss(wrapped, seed=microbatch).backward()
    assert all(not hasattr(p, "main_grad") for p in pair.parameters() if not p.requires_grad)
    return [p.main_grad.clone() for p in pair.parameters() if p.requires_grad]


def test_gradients_are_added_up_in_the_buffers():
    [[fused, plain]] = run_distributed(_both_accumulated, 1)
    assert len(fused) == 8
    for ours, expected in zip(fused, plain, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(ours, expected)


def _half_frozen_group():
    backend = _engine()
    from flexolmo_megatron.model.engine import prepare_engine

    source = random_model("moe", 4, 2)
    model = _build("moe", source.card.model, backend)
    model.decoder.layers[0].mlp.experts.linear_fc1.weight0.requires_grad_(False)
    with pytest.raises(ValueError, match="Transformer Engine takes all or none"):
        prepare_engine(_wrapped(model), None)


def test_a_group_of_experts_cannot_be_frozen_in_part():
    run_distributed(_half_frozen_group, 1)


def _router_tuning():
    """Gradients of routers, by layer, where nothing else trains: of the engine's fused path and of the local one."""
    backend = _engine()
    from flexolmo_megatron.model.weights import load_weights
    from flexolmo_megatron.training.freezing import freeze_all_but_router

    source, found = random_model("moe", 4, 2), []
    for given, settings in ((backend, dict(moe_permute_fusion=True)), (None, {})):
        model = _build("moe", source.card.model, given, **settings)
        load_weights(model, source)
        freeze_all_but_router(model)
        _loss(model).backward()
        found.append([layer.mlp.router.weight.grad for layer in model.decoder.layers])
    return found


def test_every_layer_s_router_is_tuned_where_its_input_needs_no_gradient():
    [(fused, local)] = run_distributed(_router_tuning, 1)
    for ours, expected in zip(fused, local, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
