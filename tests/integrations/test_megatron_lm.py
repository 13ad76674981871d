"""Launches through Megatron-LM: the parts that need no checkout here, real launches in test_megatron_lm_launch.py."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.convert.model import newest_checkpoint, open_model, save_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.integrations.cards import check_checkpoints, write_cards
from flexolmo_megatron.integrations.megatron_lm.__main__ import find_tree, main
from flexolmo_megatron.integrations.megatron_lm.arguments import LaunchArguments, dense_card
from flexolmo_megatron.integrations.megatron_lm.specs import DENSE, MOE, PAIR
from tests.random_models import SIZES, random_model

ROOT = Path(__file__).parent.parent.parent
MODULE = "flexolmo_megatron.integrations.megatron_lm"


def test_importing_the_package_imports_nothing_of_megatron():
    code = ("import sys, flexolmo_megatron, flexolmo_megatron.integrations.megatron_lm; "
            "assert not {'torch', 'megatron'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _run(*argv, path):
    return subprocess.run([sys.executable, "-m", MODULE, *argv], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": f"{path}:{ROOT}"})


def _tree(folder, version, core=True):
    for name in ("core", "training") if core else ("training",):
        (folder / "megatron" / name).mkdir(parents=True)
        (folder / "megatron" / name / "__init__.py").touch()
    if core:
        major, minor, patch = version.split(".")
        (folder / "megatron" / "core" / "package_info.py").write_text(
            f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ''\n")
    return folder


def test_without_a_checkout_the_message_says_how_to_get_one():
    with pytest.raises(FlexOlmoError, match="megatron.training cannot be imported .* git clone --branch core_v0.16.1"):
        find_tree()


@pytest.mark.parametrize(("version", "core", "message"), [
    ("0.18.0", True, "is Megatron-LM with core 0.18.0: tested is <0.17,>=0.16.1; run: git -C"),
    ("0.16.1", False, "expected both from the checkout; put"),
])
def test_another_version_and_a_mixed_path_are_refused(tmp_path, version, core, message):
    result = _run(path=_tree(tmp_path, version, core))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("flexolmo: ") and message in result.stderr and "Traceback" not in result.stderr


def test_specs_are_objects_as_megatron_lm_wants_them():
    from megatron.core.transformer.spec_utils import ModuleSpec, import_module

    assert all(isinstance(spec, ModuleSpec) for spec in (DENSE, PAIR, MOE))
    assert import_module((f"{MODULE}.specs", "PAIR")) is PAIR


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    """A published anchor."""
    path = tmp_path_factory.mktemp("anchors") / "anchor"
    save_model(random_model("moe", 1, 1), path, "hf")
    return path


def _parse(monkeypatch, *options):
    """Megatron-LM's way with an extra_args_provider, on a parser with two arguments of its own."""
    monkeypatch.setattr(sys, "argv", ["launch", *options])
    arguments = LaunchArguments()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--moe-z-loss-coeff", type=float)
    return arguments, arguments(parser).parse_args()


def test_the_anchor_gives_the_architecture(monkeypatch, anchor):
    options = ["--flexolmo-anchor", str(anchor), "--flexolmo-expert", "own", "--flexolmo-domain-vector", "own.npz"]
    arguments, args = _parse(monkeypatch, *options, "--flexolmo-ffn-hidden-size", "40")
    arguments.check(args)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.anchor_ffn_hidden_size) == (2, 32, 40, 48)
    assert (args.padded_vocab_size, args.num_experts, args.moe_ffn_hidden_size) == (SIZES.vocab_size, 2, 40)
    assert args.router_bias and args.hetereogenous_dist_checkpoint and args.moe_z_loss_coeff == 1e-3
    assert arguments.plan.card.expert_names == ["public", "own"]

    _, args = _parse(monkeypatch, *options, "--flexolmo-no-bias", "--moe-z-loss-coeff", "0.5")
    assert not args.router_bias and args.moe_z_loss_coeff == 0.5


def test_an_architecture_that_is_not_the_anchors_is_refused(monkeypatch, anchor):
    options = ["--flexolmo-anchor", str(anchor), "--flexolmo-expert", "own", "--flexolmo-domain-vector", "own.npz"]
    arguments, args = _parse(monkeypatch, *options, "--num-layers", "3")
    with pytest.raises(FlexOlmoError, match="argument num_layers = 3: expected 2, as the anchor demands; leave"):
        arguments.check(args)
    arguments, args = _parse(monkeypatch, *options)
    args.use_megatron_fsdp = True
    with pytest.raises(FlexOlmoError, match="use_megatron_fsdp = True: expected False, the only value supported"):
        arguments.check(args)


def test_an_expert_needs_a_name_and_a_vector(monkeypatch, anchor):
    with pytest.raises(FlexOlmoError, match="name"):
        _parse(monkeypatch, "--flexolmo-anchor", str(anchor), "--flexolmo-domain-vector", "own.npz")
    with pytest.raises(FlexOlmoError, match="domain_vector has no value: expected a file from `flexolmo embed`"):
        _parse(monkeypatch, "--flexolmo-anchor", str(anchor), "--flexolmo-expert", "own")


def test_a_new_anchor_gets_its_card_from_the_launch(monkeypatch):
    arguments, args = _parse(monkeypatch)
    for name, value in asdict(SIZES).items():
        setattr(args, {"vocab_size": "padded_vocab_size"}.get(name, name), value)
    args.kv_channels, args.tokenizer_type, args.tokenizer_model = 8, "HuggingFaceTokenizer", "some/tokenizer"
    arguments.check(args)
    card = dense_card(args)
    assert card.kind == "dense" and card.model == SIZES
    assert card.tokenizer == {"type": "huggingface", "path": "some/tokenizer"}
    args.kv_channels = 16
    with pytest.raises(FlexOlmoError, match="kv_channels = 16: expected hidden_size / num_attention_heads = 8"):
        dense_card(args)


def _checkpoint(folder, iteration, card=None):
    """What Megatron-LM leaves of a checkpoint, as far as cards are concerned."""
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    args = argparse.Namespace(consumed_train_samples=4 * iteration, seq_length=32, lr=5e-3, seed=1)
    if card is not None:
        args.flexolmo_card = json.dumps(asdict(card))
    torch.save({"args": args, "iteration": iteration}, path / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
                "common_backend_version": 1}
    (path / "metadata.json").write_text(json.dumps(backends))
    (path / ".metadata").touch()
    return path


def test_cards_are_written_from_the_arguments_in_the_checkpoint(tmp_path):
    card = replace(random_model("pair", 2, 2).card, anchor_digest="a" * 64)
    first, second = _checkpoint(tmp_path, 3, card), _checkpoint(tmp_path, 6, card)
    torn = _checkpoint(tmp_path, 9, card)
    (torn / ".metadata").unlink()
    assert write_cards(tmp_path) == [first, second]
    assert write_cards(tmp_path) == []
    assert not (torn / "flexolmo.json").exists()
    assert newest_checkpoint(tmp_path) == second
    assert ModelCard.load(second) == replace(card, training={"tokens": 768, "steps": 6, "lr": 5e-3, "seed": 1})


def test_cards_of_a_run_in_bridge_are_written_from_its_settings(tmp_path, capsys, monkeypatch):
    card = replace(random_model("pair", 2, 2).card, anchor_digest="a" * 64)
    settings = {"model": {"flexolmo_card": card.to_json(), "seq_length": 32}, "train": {"global_batch_size": 4},
                "optimizer": {"lr": 5e-3}, "rng": {"seed": 1}}
    path = _checkpoint(tmp_path, 3)
    (path / "run_config.yaml").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["megatron_lm", "cards", str(tmp_path)])
    assert main() == 0
    assert capsys.readouterr().out == f"{tmp_path}: cards of 1 checkpoints written\n"
    assert ModelCard.load(path) == replace(card, training={"tokens": 384, "steps": 3, "lr": 5e-3, "seed": 1})
    (path / "flexolmo.json").unlink()
    (path / "run_config.yaml").write_text("model: {seq_length: 32}")
    with pytest.raises(FlexOlmoError, match="iter_0000003 was not written by a run of flexolmo_megatron.integrations"
                                            ".bridge: expected model.flexolmo_card in its run_config.yaml"):
        write_cards(tmp_path)


def test_a_launch_goes_on_with_checkpoints_of_its_own_run_alone(tmp_path):
    card = replace(random_model("pair", 2, 2).card, anchor_digest="a" * 64)
    _checkpoint(tmp_path, 3, card)
    check_checkpoints(str(tmp_path), str(tmp_path), card)
    with pytest.raises(FlexOlmoError, match="iter_0000003 belongs to another run: its anchor digest is a{64}, this "
                                            "run's is b{64}"):
        check_checkpoints(None, str(tmp_path), replace(card, anchor_digest="b" * 64))


def test_checkpoints_of_other_launches_are_refused(tmp_path):
    path = _checkpoint(tmp_path, 3)
    with pytest.raises(FlexOlmoError, match="was not written by a launch of flexolmo_megatron"):
        write_cards(tmp_path)
    with pytest.raises(FlexOlmoError, match=f"holds checkpoints without flexolmo.json; .* {MODULE} cards {tmp_path}"):
        open_model(tmp_path)
    with pytest.raises(FlexOlmoError, match=f"has no flexolmo.json: .* {MODULE} cards {tmp_path}"):
        open_model(path)
