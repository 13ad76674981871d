"""Public data mixed into an owner's run, and the loss that teaches the router whose document a token is from."""

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.convert.model import open_model


def mixed(world, share=0.5):
    return [f"data.public=[{world}/public]", f"data.public_share={share}"]


def test_the_share_of_public_samples(world, expert_options, tmp_path):
    from flexolmo_megatron.training.datasets import batches, build_datasets
    from flexolmo_megatron.training.run import _blend
    from flexolmo_megatron.training.tokenizer import load_tokenizer

    config = load_config(TrainConfig, overrides=expert_options(tmp_path / "run", *mixed(world, 0.25))[2:])
    blend = _blend(config)
    assert blend == [0.75, f"{world}/own", 0.25, f"{world}/public"]
    data = build_datasets(
        train=blend,
        train_samples=400,
        sequence_length=32,
        seed=1,
        tokenizer=load_tokenizer({"type": "byte"}),
        vocab_size=264,
        cache_dir=tmp_path / "cache",
    )
    identifiers = torch.cat([batch["dataset_id"] for batch in batches(data.train, micro_batch_size=4)])[:400]
    assert (identifiers == 1).sum().item() == pytest.approx(100, abs=1)


def test_the_domain_loss_falls_and_is_recorded(world, expert_options, metrics, tmp_path):
    options = [*mixed(world), "expert.domain_loss_coeff=1", "train_iters=12", "optimizer.lr=5e-2"]
    assert main(expert_options(tmp_path / "run", *options)) == 0
    losses = [row["domain_loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.03


def test_without_the_loss_nothing_is_recorded(world, expert_options, metrics, tmp_path):
    assert main(expert_options(tmp_path / "run", *mixed(world), "train_iters=2")) == 0
    assert "domain_loss" not in metrics(tmp_path / "run")[0]


def test_the_domain_loss_reaches_the_row_and_the_bias_alone(world):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from flexolmo_megatron.config.card import ExpertRecord, ModelCard
    from flexolmo_megatron.model.builder import build_model
    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.runtime.setup import initialize

    initialize()
    anchor = open_model(world / "anchor").card.model
    from dataclasses import replace

    pair = replace(anchor, num_experts=2, top_k=2, router_bias=True)
    assert ModelCard("pair", pair, [ExpertRecord("public"), ExpertRecord("own")]).kind == "pair"
    torch.manual_seed(0)
    router = (
        build_model(pair, "pair", transformer_config(pair, "pair", domain_loss_coeff=0.5, domain_margin=3.0))
        .decoder.layers[0]
        .mlp.router
    )
    router.set_layer_number(1)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # what the schedule does for a run with one microbatch
    with torch.no_grad():
        router.public_row.normal_()
        router.row.normal_()
    hidden = torch.randn(5, 2, 32)
    gradients = {}
    for own in (None, torch.tensor([True, False])):
        router.own_B = own
        router.zero_grad()
        x = hidden.clone().requires_grad_()
        share = router(x)
        share.sum().backward()
        gradients[own is None] = x.grad, router.row.grad.clone(), router.bias.grad.clone()
    assert torch.equal(gradients[True][0], gradients[False][0])

    # By hand: d/d row of coeff * mean((margin - wanted)^2) = coeff * mean(2 * (margin - wanted) * x).
    margin = (hidden @ (router.row - router.public_row).T).detach()
    error = 2 * (margin - torch.tensor([3.0, -3.0])[None, :, None]) / margin.numel()
    torch.testing.assert_close(
        gradients[False][1] - gradients[True][1], 0.5 * (error * hidden).sum((0, 1))[None], rtol=1e-4, atol=1e-6
    )
    assert not torch.equal(gradients[False][2], gradients[True][2])


@pytest.mark.parametrize(
    "options, message",
    [
        (["data.public_share=0.5"], "data.public_share = 0.5 with 0 entries in data.public: expected both or neither"),
        (
            ["expert.domain_loss_coeff=1"],
            "expert.domain_loss_coeff = 1.0: expected a number of 0 or more, and data.public where it is above 0",
        ),
        (["expert.domain_loss_coeff=.nan"], "expert.domain_loss_coeff = nan: expected a number of 0 or more"),
        (["expert.routing_noise=-1"], "expert.routing_noise = -1.0: expected a number of 0 or more"),
        (["expert.domain_margin=0"], "expert.domain_margin = 0.0: expected a number above 0"),
    ],
)
def test_bad_input(expert_options, tmp_path, capsys, options, message):
    assert main(expert_options(tmp_path / "run", *options)) == 2
    assert message in capsys.readouterr().err


def test_routing_noise_depends_on_seed_sequence_and_layer_alone():
    from flexolmo_megatron.training.passes import routing_noise

    tokens = torch.arange(400 * 8).view(400, 8)
    noise = routing_noise(tokens, 6, seed=1)
    assert torch.equal(routing_noise(tokens[3:5], 6, seed=1), noise[3:5])
    assert not torch.equal(routing_noise(tokens, 6, seed=2), noise)
    assert noise.unique().numel() == noise.numel()
    assert abs(noise.mean().item()) < 0.1 and abs(noise.std().item() - 1) < 0.1


def test_routing_noise_moves_the_owners_logit_while_training(world, expert_options, metrics, tmp_path):
    from flexolmo_megatron.model.router import PairRouter
    from flexolmo_megatron.training import passes

    seen = []
    forward = PairRouter.forward

    def recorded(self, input, padding_mask=None):
        share = forward(self, input, padding_mask)
        logits = self.gating(input).detach()
        margin = logits[..., 1] - logits[..., 0]
        seen.append((self.training, self.layer_number, (share.detach()[..., 0].logit() - margin).mean(0)))
        return share

    drawn = []
    draw = passes.routing_noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairRouter, "forward", recorded)
        patch.setattr(passes, "routing_noise", lambda *args: (drawn.append(draw(*args)), drawn[-1])[1])
        options = ["expert.routing_noise=3", "train_iters=1", f"data.valid=[{world}/own]", "eval_iters=1"]
        assert main(expert_options(tmp_path / "run", *options)) == 0
    training = [(layer, added) for trains, layer, added in seen if trains]
    layers = drawn[0].shape[1]
    assert len(training) == len(drawn) * layers
    for call, (layer, added) in enumerate(training):
        torch.testing.assert_close(added, 3 * drawn[call // layers][:, layer - 1], atol=1e-4, rtol=1e-4)
    evaluated = [added for trains, _, added in seen if not trains]
    assert evaluated and all(added.abs().max() < 1e-5 for added in evaluated)
