"""The penalty on moving the mean hidden state of the owner's documents, by hand and in runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.domain.vector import load_vector, save_vector


def test_the_gradient_is_that_of_the_squared_distance_of_the_step_before():
    """rtol 1e-5: sums in fp32."""
    from flexolmo_megatron.model.mean_drift import MeanDrift

    expected_h, deviation_h = torch.tensor([1.0, -2, 0]), torch.tensor([0.5, 2, 4])
    drift = MeanDrift(expected_h, deviation_h, 0.5)
    states_sbh = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own_b = torch.tensor([True, False, True, True])

    penalty = drift.penalty(states_sbh[:, :3], own_b[:3])
    assert penalty == 0, "nothing is known of a step before the first"
    drift.penalty(states_sbh[:, 3:], own_b[3:])
    drift.advance(drift.sums)
    mean_h = states_sbh[:, own_b].mean((0, 1))
    z_h = (mean_h - expected_h) / deviation_h
    torch.testing.assert_close(drift.drift_h, z_h.detach(), rtol=1e-5, atol=1e-6)

    # Three own sequences of four: three quarters of |z|^2 where the step before was the same, and of half its gradient.
    (by_hand,) = torch.autograd.grad(z_h.square().sum(), states_sbh, retain_graph=True)
    again = drift.penalty(states_sbh, own_b)
    torch.testing.assert_close(again, z_h.square().sum() * 0.75, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(again, states_sbh)
    torch.testing.assert_close(found, by_hand * 0.75 / 2, rtol=1e-5, atol=1e-7)
    assert not found[:, 1].any()


def test_a_step_without_own_tokens_leaves_the_drift_as_it_was():
    from flexolmo_megatron.model.mean_drift import MeanDrift

    drift = MeanDrift(torch.zeros(3), torch.ones(3), 1)
    drift.drift_h = torch.tensor([1.0, 2, 3])
    assert drift.penalty(torch.ones(2, 1, 3), torch.tensor([False])) == 0
    drift.advance(drift.sums)
    assert drift.drift_h.tolist() == [1, 2, 3]


def test_the_drift_is_smaller_with_the_penalty(world, expert_options, metrics, tmp_path):
    """In a run on one data set, which has no numbers of data sets, and beside public documents."""
    options = [f"expert.domain_vector={world}/discriminant.npz", "optimizer.lr=1e-3", "train_iters=30"]
    for name, more in (("alone", []), ("mixed", [f"data.public=[{world}/public]", "data.public_share=0.5"])):
        last = {}
        for coefficient in (1e-9, 0.3):
            run = tmp_path / f"{name} {coefficient}"
            assert main(expert_options(run, *options, *more, f"expert.drift_coeff={coefficient}")) == 0
            rows = metrics(run)
            assert rows[0]["mean_drift"] == 0
            last[coefficient] = sum(row["mean_drift"] for row in rows[-5:])
        assert last[0.3] < last[1e-9] / 2


def test_without_the_penalty_nothing_is_recorded(world, expert_options, metrics, tmp_path):
    assert main(expert_options(tmp_path / "run", f"expert.domain_vector={world}/discriminant.npz")) == 0
    assert "mean_drift" not in metrics(tmp_path / "run")[0]


def test_a_skipped_step_is_not_counted(world, expert_options, metrics, tmp_path, monkeypatch):
    """What it saw is forgotten, and the drift of the step before it is used once more."""
    from flexolmo_megatron.model.mean_drift import MeanDrift

    penalty, advance, last, used, advanced = MeanDrift.penalty, MeanDrift.advance, [], [], []

    def broken(self, states_sbh, own_b):
        used.append(self.drift_h)
        last.append((own_b.sum() * len(states_sbh), states_sbh[:, own_b].double().sum((0, 1)).detach()))
        value = penalty(self, states_sbh, own_b)
        return value * (float("nan") if 4 < len(used) <= 8 else 1)  # step 2: two layers, two microbatches

    def checked(self, sums):
        advanced.append((sums.clone(), self))
        advance(self, sums)

    monkeypatch.setattr(MeanDrift, "penalty", broken)
    monkeypatch.setattr(MeanDrift, "advance", checked)
    options = [f"expert.domain_vector={world}/discriminant.npz", "expert.drift_coeff=0.1", "train_iters=3"]
    assert main(expert_options(tmp_path / "run", *options)) == 0
    assert ["skipped" in row for row in metrics(tmp_path / "run")] == [False, True, False]
    assert len(advanced) == 4 and len(used) == 12
    assert used[4] is used[8] and used[5] is used[9] and used[4].any() and used[5].any()
    # Each layer's calls in a step are the first and third or the second and fourth.
    for layer, (sums, _) in enumerate(advanced[2:]):
        tokens, states_h = (sum(parts) for parts in zip(last[8 + layer], last[10 + layer], strict=True))
        assert sums[-1] == tokens
        torch.testing.assert_close(sums[:-1], states_h, rtol=1e-5, atol=1e-4)  # sums in fp32


def test_public_documents_do_not_count(world, expert_options, tmp_path, monkeypatch):
    from flexolmo_megatron.model.mean_drift import MeanDrift
    from flexolmo_megatron.training import passes

    seen, wanted = [], []
    penalty, set_routers = MeanDrift.penalty, passes._set_routers

    def recorded(self, states_sbh, own_b):
        seen.append(own_b.tolist())
        return penalty(self, states_sbh, own_b)

    def expected(config, own_prefixes, batch, model):
        wanted.extend([(batch["dataset_id"] == 0).tolist()] * 2)  # layers
        set_routers(config, own_prefixes, batch, model)

    monkeypatch.setattr(MeanDrift, "penalty", recorded)
    monkeypatch.setattr(passes, "_set_routers", expected)
    options = [f"expert.domain_vector={world}/discriminant.npz", "expert.drift_coeff=0.1", "data.valid=[]"]
    mixed = [f"data.public=[{world}/public]", "data.public_share=0.5"]
    assert main(expert_options(tmp_path / "run", *options, *mixed)) == 0
    assert seen == wanted and {True, False} == {value for row in seen for value in row}


def test_validation_does_not_count(world, expert_options, metrics, tmp_path):
    options = [f"expert.domain_vector={world}/discriminant.npz", "expert.drift_coeff=0.1"]
    for name, interval in (("often", 1), ("once", 0)):
        assert main(expert_options(tmp_path / name, *options, f"eval_interval={interval}")) == 0
    often, once = ([row["mean_drift"] for row in metrics(tmp_path / name)] for name in ("often", "once"))
    assert often == once and any(once)


def test_other_kinds_of_runs_have_none():
    from flexolmo_megatron.config.load import load_config
    from flexolmo_megatron.config.train import TrainConfig
    from flexolmo_megatron.errors import FlexOlmoError
    from flexolmo_megatron.training.planning import plan

    config = load_config(TrainConfig, overrides=["out=o", "data.train=[x]", "expert.drift_coeff=0.5"])
    with pytest.raises(FlexOlmoError, match="^expert.drift_coeff = 0.5 is an option of `train expert`: expected none"):
        plan("anchor", config, 1)


@pytest.mark.parametrize("options, message", [
    (["expert.drift_coeff=-1"], "expert.drift_coeff = -1.0: expected a number of 0 or more"),
    (["expert.drift_coeff=.inf"], "expert.drift_coeff = inf: expected a number of 0 or more"),
    (["expert.drift_coeff=1", "expert.random_row=true"],
     "expert.drift_coeff = 1.0 with expert.random_row = True: expected expert.random_row = False, or 0"),
    (["expert.drift_coeff=1", "expert.coordination=false"],
     "expert.drift_coeff = 1.0 with expert.coordination = False: expected expert.coordination = True, or 0"),
    (["expert.drift_coeff=1"], "own.npz does not hold the mean hidden state of its documents; expected a file that "
                               "`flexolmo embed --public` of this version wrote, or 0"),
])
def test_bad_input(expert_options, tmp_path, capsys, options, message):
    assert main(expert_options(tmp_path / "run", *options)) == 2
    assert message in capsys.readouterr().err


def test_a_run_goes_on_with_the_coefficient_that_it_began_with(world, expert_options, tmp_path, capsys):
    options = [f"expert.domain_vector={world}/discriminant.npz", "stop_after=1"]
    assert main(expert_options(tmp_path / "run", *options)) == 0
    assert main(expert_options(tmp_path / "run", *options, "expert.drift_coeff=0.1")) == 2
    assert "expert.drift_coeff = 0.1: the run in " in capsys.readouterr().err


def test_a_vector_of_an_early_version_serves_a_run_without_the_penalty(world, expert_options, tmp_path):
    vector = load_vector(world / "discriminant.npz")
    save_vector(replace(vector, moments=None), tmp_path / "old.npz")
    assert main(expert_options(tmp_path / "run", f"expert.domain_vector={tmp_path}/old.npz", "stop_after=1")) == 0
    assert np.isfinite(vector.moments).all()
