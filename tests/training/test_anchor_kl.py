"""The loss that keeps a pair near its anchor on public documents."""

from pathlib import Path

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.model import open_model
from tests.distributed import run_distributed
from tests.training.runs import metrics

PUBLIC = ["data.public_share=0.5", "expert.routing_noise=1", "log_interval=100"]


def _public(world: Path) -> list[str]:
    return [f"data.public=[{world}/public]", *PUBLIC]


def test_divergence_and_gradient_are_those_of_torch():
    from flexolmo_megatron.runtime.setup import initialize
    from flexolmo_megatron.training.anchor_kl import divergence

    initialize()
    torch.manual_seed(1)
    pair, anchor = torch.randn(2, 3, 11, dtype=torch.float64) * 3, torch.randn(2, 3, 11, dtype=torch.float64) * 3
    weight = torch.rand(2, 3)
    expected, found = pair.clone().requires_grad_(), pair.float().requires_grad_()
    by_torch = torch.nn.functional.kl_div(expected.log_softmax(-1), anchor.log_softmax(-1), reduction="none",
                                          log_target=True).sum(-1)
    (by_torch * weight).sum().backward()
    ours = divergence(found, anchor.float())
    (ours * weight).sum().backward()
    torch.testing.assert_close(ours, by_torch.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.grad, expected.grad.float(), rtol=1e-5, atol=1e-6)


def test_the_anchor_of_a_pair_is_the_published_one_and_the_loss_is_as_without(world):
    """Against the anchor as it is loaded for inference, and the pair's own loss."""
    from flexolmo_megatron.config.load import load_config
    from flexolmo_megatron.config.train import TrainConfig
    from flexolmo_megatron.inference.model import load_model
    from flexolmo_megatron.model.router import PairRouter
    from flexolmo_megatron.runtime.setup import initialize
    from flexolmo_megatron.training.anchor_kl import losses_and_divergence
    from flexolmo_megatron.training.planning import plan
    from flexolmo_megatron.training.start import start

    initialize()
    config = load_config(TrainConfig, overrides=["out=x", f"data.train=[{world}/own]", f"anchor={world}/anchor",
                                                 "expert.name=own", "expert.random_row=true", "data.seq_length=32"])
    (model,) = start(plan("expert", config, 1), config, resumes=False).chunks
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in model.module.decoder.layers:
            layer.mlp.expert.linear_fc2.weight.normal_()
    tokens = torch.randint(0, 250, (3, 8))
    batch = {"tokens": tokens, "position_ids": torch.arange(8).expand(3, 8), "labels": tokens.roll(-1, 1)}
    public = torch.tensor([True, False, True])
    losses, divergences = losses_and_divergence(model, batch, public)
    usual = model(tokens, batch["position_ids"], None, labels=batch["labels"])
    assert torch.equal(losses, usual)
    pair = model(tokens, batch["position_ids"], None).detach().log_softmax(-1)
    anchor = load_model(world / "anchor").logits(tokens).log_softmax(-1)
    expected = (anchor.exp() * (anchor - pair)).sum(-1) * public[:, None]
    torch.testing.assert_close(divergences.detach(), expected, rtol=1e-4, atol=1e-6)
    assert (expected[0] > 1e-3).all() and not divergences[1].any()
    assert any(isinstance(module, PairRouter) for module in model.modules())


def test_it_holds_the_pair_near_the_anchor(world, expert_options, tmp_path):
    options = [*_public(world), "train_iters=30", "optimizer.lr=2e-2"]
    runs = {}
    for coefficient in (1e-6, 100):
        out = tmp_path / f"run_{coefficient}"
        assert main(expert_options(out, *options, f"expert.anchor_kl_coeff={coefficient}")) == 0
        runs[coefficient] = metrics(out)
    weak, strong = ([row["anchor_kl"] for row in rows] for rows in runs.values())
    assert abs(weak[0]) < 1e-5 and abs(strong[0]) < 1e-5  # the expert starts as the anchor's copy
    assert 0 < strong[-1] < weak[-1] / 2
    assert main(expert_options(tmp_path / "none", *options)) == 0
    rows = metrics(tmp_path / "none")
    assert "anchor_kl" not in rows[0]
    # So small a weight changes next to nothing: what is reported as loss is the cross-entropy alone, as without.
    assert rows[-1]["loss"] == pytest.approx(runs[1e-6][-1]["loss"], rel=1e-4)
    assert rows[-1]["valid_loss"] == pytest.approx(runs[1e-6][-1]["valid_loss"], rel=1e-4)


def test_a_resumed_run_is_the_same_to_the_last_bit(world, expert_options, tmp_path):
    options = [*_public(world), "expert.anchor_kl_coeff=2", "train_iters=6"]
    assert main(expert_options(tmp_path / "whole", *options)) == 0
    for _ in range(2):
        assert main(expert_options(tmp_path / "parts", *options, "stop_after=3")) == 0
    whole, parts = open_model(tmp_path / "whole"), open_model(tmp_path / "parts")
    assert all(torch.equal(tensor.read(), parts.tensors[name].read()) for name, tensor in whole.tensors.items())


LAYOUTS = {
    "dp2": ["optimizer.use_distributed_optimizer=true"],
    "tp2 sp": ["micro_batch_size=4", "parallel.tensor=2", "parallel.sequence=true"],
    "cp2": ["parallel.context=2"],
}


def run_layouts(world: Path, options: list[str], out: Path) -> None:
    """What each of two processes does."""
    from flexolmo_megatron.runtime.setup import prepare

    prepare()
    from megatron.core import parallel_state

    for name, layout in LAYOUTS.items():
        assert main([*options, f"out={out / name}", *layout]) == 0, name
        parallel_state.destroy_model_parallel()


def test_layouts_of_two_processes_give_what_one_does(world, expert_options, tmp_path):
    options = [*_public(world), "expert.anchor_kl_coeff=30", "optimizer.lr=2e-2", "optimizer.adam_eps=1e-3",
               "train_iters=5"]
    assert main(expert_options(tmp_path / "one", *options)) == 0
    run_distributed(run_layouts, 2, world, expert_options(tmp_path, *options), tmp_path)
    one = open_model(tmp_path / "one")
    for name in LAYOUTS:
        for before, after in list(zip(metrics(tmp_path / "one"), metrics(tmp_path / name), strict=True))[1:]:
            for key in ("loss", "anchor_kl", "grad_norm"):
                assert after[key] == pytest.approx(before[key], rel=2e-3), (name, key)
        for key, tensor in open_model(tmp_path / name).tensors.items():
            torch.testing.assert_close(tensor.read(), one.tensors[key].read(), rtol=0, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.parametrize(("options", "message"), [
    (["expert.anchor_kl_coeff=1"],
     "expert.anchor_kl_coeff = 1.0: expected a number of 0 or more, and data.public where it is above 0"),
    (["expert.anchor_kl_coeff=-1"], "expert.anchor_kl_coeff = -1.0: expected a number of 0 or more"),
    (["PUBLIC", "expert.anchor_kl_coeff=1", "parallel.pipeline=2"],
     "expert.anchor_kl_coeff = 1.0 with parallel.pipeline = 2: expected parallel.pipeline = 1, or 0"),
    (["PUBLIC", "expert.anchor_kl_coeff=1", "expert.coordination=false"],
     "expert.anchor_kl_coeff = 1.0 with expert.coordination = False: expected expert.coordination = True, or 0"),
])
def test_what_cannot_be_is_refused(world, expert_options, tmp_path, capsys, options, message):
    options = [word for option in options for word in (_public(world) if option == "PUBLIC" else [option])]
    from flexolmo_megatron.config.load import load_config
    from flexolmo_megatron.config.train import TrainConfig
    from flexolmo_megatron.errors import FlexOlmoError

    config = load_config(TrainConfig, overrides=expert_options(tmp_path / "run", *options)[2:])
    with pytest.raises(FlexOlmoError) as refused:
        config.validate(1)
    assert message in str(refused.value)
