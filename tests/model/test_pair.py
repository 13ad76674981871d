"""The dense coupled pair against Megatron's sparse layer with two of two experts: outputs and gradients, fp32.

1e-5: both sum the same products, in another order.
"""

import pytest
import torch
from torch import Tensor, nn

from flexolmo_megatron.inference.pair import couple
from flexolmo_megatron.runtime.setup import initialize
from tests.random_models import SIZES, random_model

TOLERANCE = dict(rtol=0, atol=1e-5)


def _layers(bias: float | None, window: int = 1) -> tuple[nn.Module, nn.Module]:
    """The first layer's FFN of the same model as pair and as mixture, in training mode."""
    from flexolmo_megatron.model.builder import build_model
    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.model.weights import load_anchor, load_weights

    initialize()
    anchor = random_model("moe", 1, 1)
    pair = random_model("pair", 2, 2, seed=1, bias=bias is not None, window=window)
    config = transformer_config(pair.card.model, "pair", moe_z_loss_coeff=0.1)
    coupled = build_model(pair.card.model, "pair", config)
    load_anchor(coupled, anchor)
    load_weights(coupled, pair)
    merged = couple(anchor, pair)
    config = transformer_config(merged.card.model, "moe", moe_z_loss_coeff=0.1)
    sparse = build_model(merged.card.model, "moe", config)
    load_weights(sparse, merged)
    layers = [model.decoder.layers[0].mlp.train() for model in (coupled, sparse)]
    if bias is not None:
        with torch.no_grad():
            layers[0].router.bias.fill_(bias)
            layers[1].router.bias.copy_(torch.tensor([0.0, bias]))
    return layers[0], layers[1]


def _run(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Output and input gradient for fixed inputs `[s, b, h]` and a fixed loss; leaves the weights' gradients behind."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(11, 3, SIZES.hidden_size, generator=generator, requires_grad=True)
    output, _ = layer(hidden)
    output.backward(torch.randn(output.shape, generator=generator))
    return output.detach(), hidden.grad


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("bias", [None, -0.7, 0.0, 0.4])
def test_output_and_gradients(bias, window):
    pair, sparse = _layers(bias, window)
    output, input_gradient = _run(pair)
    expected, expected_input_gradient = _run(sparse)
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, **TOLERANCE)
    torch.testing.assert_close(input_gradient, expected_input_gradient, **TOLERANCE)
    anchor, expert = sparse.experts.local_experts
    for ours, theirs in ((pair.anchor, anchor), (pair.expert, expert)):
        torch.testing.assert_close(ours.linear_fc1.weight.grad, theirs.linear_fc1.weight.grad, **TOLERANCE)
        torch.testing.assert_close(ours.linear_fc2.weight.grad, theirs.linear_fc2.weight.grad, **TOLERANCE)
    rows = torch.cat([pair.router.public_row.grad, pair.router.row.grad])
    torch.testing.assert_close(rows, sparse.router.weight.grad, **TOLERANCE)
    if bias is not None:
        torch.testing.assert_close(pair.router.bias.grad, sparse.router.bias.grad[1:], **TOLERANCE)


def test_a_bias_above_zero_has_no_effect():
    outputs = {bias: _run(_layers(bias)[0])[0] for bias in (-0.7, 0.0, 0.4)}
    assert torch.equal(outputs[0.0], outputs[0.4])
    assert not torch.allclose(outputs[0.0], outputs[-0.7], atol=1e-3)


def test_frozen_anchor_gets_no_weight_gradient_and_passes_the_same_input_gradient():
    pair, _ = _layers(None)
    _, expected = _run(pair)
    pair, _ = _layers(None)
    frozen = [*pair.anchor.parameters(), pair.router.public_row]
    for parameter in frozen:
        parameter.requires_grad_(False)
    _, input_gradient = _run(pair)
    torch.testing.assert_close(input_gradient, expected, **TOLERANCE)
    assert all(parameter.grad is None for parameter in frozen)
    assert all(parameter.grad is not None for parameter in (*pair.expert.parameters(), pair.router.row))
