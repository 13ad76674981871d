"""How runs begin: what is refused before torch.distributed is asked for anything, and what belongs to another run."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.config.train import ExpertConfig, TrainConfig
from flexolmo_megatron.convert.lazy import LazyTensor
from flexolmo_megatron.convert.megatron_writer import save_megatron
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.variants import as_dense
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.model.builder import build_model
from flexolmo_megatron.model.config import transformer_config
from flexolmo_megatron.model.weights import live_model
from flexolmo_megatron.runtime.setup import initialize
from flexolmo_megatron.training.planning import plan_expert
from flexolmo_megatron.training.start import fill
from tests.random_models import random_model, tensors_of
from tests.training.runs import SMALL


@pytest.mark.parametrize(("processes", "mode", "options", "message"), [
    (2, "anchor", ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
     "parallel.pipeline = 2 times parallel.virtual_pipeline = 2 does not divide model.num_layers = 2"),
    (4, "anchor", ["parallel.tensor=4"], "model.num_query_groups = 2 cannot be split over parallel.tensor = 4"),
    (3, "anchor", [], "global_batch_size = 4: expected a multiple of micro_batch_size = 2 times the 3 data-parallel"),
    (2, "moe", ["model.num_experts=3", "model.top_k=1", "parallel.expert=2"],
     "model.num_experts = 3 cannot be split over parallel.expert = 2 processes"),
    (2, "expert", ["parallel.expert=2"], "parallel.expert = 2: expected 1 for an owner's pair"),
    (2, "expert", ["parallel.tensor=2", "expert.ffn_hidden_size=47"],
     "expert.ffn_hidden_size = 47 cannot be split over parallel.tensor = 2 processes"),
    (1, "expert", ["data.seq_length=64"], "data.seq_length = 64: expected at most model.max_position_embeddings = 32"),
])
def test_refused_before_any_process_group(world, expert_options, tmp_path, capsys, monkeypatch, processes, mode,
                                          options, message):
    from flexolmo_megatron.training import run

    def initialize(**_):
        raise AssertionError("process groups were asked for")

    monkeypatch.setattr(run, "initialize", initialize)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    command = (expert_options(tmp_path / "run", *options) if mode == "expert"
               else ["train", mode, *SMALL, f"out={tmp_path}/run", f"data.train=[{world}/own]", *options])
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_with_another_anchor_or_expert_is_not_resumed(world, expert_options, tmp_path, capsys):
    options = ["expert.random_row=true", "stop_after=1"]
    assert main(expert_options(tmp_path / "run", *options)) == 0
    first = open_model(world / "anchor")
    other = random_model("moe", 1, 1, seed=9, sizes=replace(first.card.model, num_experts=0, top_k=0))
    save_megatron(other, tmp_path / "other")
    assert main(expert_options(tmp_path / "run", *options, f"anchor={tmp_path}/other")) == 2
    error = capsys.readouterr().err
    assert "belongs to another run: its anchor digest is" in error
    assert model_digest(first) in error and model_digest(other) in error
    assert main(expert_options(tmp_path / "run", *options, "expert.name=mine")) == 2
    assert "its experts is ['public', 'own'], this run's is ['public', 'mine']" in capsys.readouterr().err
    assert main(expert_options(tmp_path / "run", *options)) == 0


def test_what_another_trainer_fills_names_its_anchor_also_where_a_dense_copy_trains(world):
    initialize()
    owner = ExpertConfig("own", f"{world}/own.npz", coordination=False)
    config = TrainConfig(out="", anchor=f"{world}/anchor", expert=owner)
    planned = plan_expert(config)
    model = build_model(planned.card.model, "dense", transformer_config(planned.card.model, "dense"))
    fill([model], planned, config)
    assert planned.card.anchor_digest == model_digest(open_model(world / "anchor"))
    filled, anchor = tensors_of(live_model(model, planned.card)), tensors_of(as_dense(open_model(world / "anchor")))
    assert filled.keys() == anchor.keys()
    assert all(torch.equal(filled[name], anchor[name]) for name in anchor)


@pytest.mark.parametrize(("options", "passes"), [([], 2), (["expert.random_row=true"], 1)])
def test_the_anchor_is_read_once_for_its_digest_and_once_more_only_for_a_domain_vectors(
        expert_options, tmp_path, monkeypatch, options, passes):
    """The digest that a domain vector names is that without the router row."""
    from flexolmo_megatron.training import start

    reads = Counter()
    real = start._digests

    def counted(anchor, dense):
        def counting(name, tensor):
            return LazyTensor(tensor.dtype, tensor.shape, lambda: (reads.update([name]), tensor.read())[1])

        return real(replace(anchor, tensors={name: counting(name, t) for name, t in anchor.tensors.items()}), dense)

    monkeypatch.setattr(start, "_digests", counted)
    assert main(expert_options(tmp_path / "run", "stop_after=1", *options)) == 0
    rows = {name for name in reads if name.endswith("mlp.gate.weight")}
    assert len(rows) == 2 and len(reads) > 20
    assert reads == {name: 1 if name in rows else passes for name in reads}


def test_the_configured_timeout_reaches_the_process_groups(expert_options, tmp_path, monkeypatch):
    from flexolmo_megatron.training import run

    given = {}
    real = run.initialize
    monkeypatch.setattr(run, "initialize", lambda **options: (given.update(options), real(**options)))
    assert main(expert_options(tmp_path / "run", "stop_after=1", "distributed_timeout_minutes=7")) == 0
    assert given["timeout_minutes"] == 7


def test_the_public_bias_of_a_mixture_stays_zero(world, tmp_path):
    options = ["model.num_experts=3", "model.top_k=2", "model.router_bias=true", f"anchor={world}/anchor"]
    assert main(["train", "moe", *SMALL, f"out={tmp_path}/run", f"data.train=[{world}/own]", *options]) == 0
    model = open_model(tmp_path / "run")
    for layer in range(2):
        bias = model.tensors[f"model.layers.{layer}.mlp.gate.bias"].read()
        assert bias[0] == 0 and (bias[1:] != 0).any()
