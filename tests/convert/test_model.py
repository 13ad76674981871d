import shutil

import pytest
import torch
import transformers

from flexolmo_megatron.convert.huggingface import open_huggingface
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.model import (
    checkpoints,
    exclude_experts,
    newest_checkpoint,
    open_model,
    save_model,
    select_experts,
    total_bytes,
    watch,
)
from flexolmo_megatron.errors import FlexOlmoError

from .conftest import assert_same_tensors, lazy_model


def test_open_model_finds_out_what_a_directory_is(tmp_path, flex_olmo):
    model = open_model(flex_olmo)
    save_model(model, tmp_path / "megatron", "megatron")
    assert_same_tensors(open_model(tmp_path / "megatron"), model)
    save_model(model, tmp_path / "hf", "hf")
    assert_same_tensors(open_model(tmp_path / "hf"), model)


def test_open_model_takes_the_newest_complete_checkpoint_of_a_run(tmp_path):
    steps = tmp_path / "run" / "checkpoints"
    models = {step: lazy_model("dense", seed=step) for step in (900, 1000)}
    for step, model in models.items():
        save_model(model, steps / f"step_{step:08d}", "megatron")
    for name in (".step_00002000.77.partial", "step_00003000", "step_last"):  # being written, cut off, not a step
        shutil.copytree(steps / "step_00000900", steps / name)
    (steps / "step_00003000" / ".metadata").unlink()
    assert checkpoints(tmp_path / "run") == [steps / "step_00000900", steps / "step_00001000"]
    assert newest_checkpoint(tmp_path / "run") == steps / "step_00001000"
    assert checkpoints(tmp_path) == [] and newest_checkpoint(tmp_path) is None
    assert_same_tensors(open_model(tmp_path / "run"), models[1000])


def test_open_model_says_what_was_expected(tmp_path):
    expected = "expected a Hugging Face directory .*, a Megatron checkpoint .* or a training run"
    with pytest.raises(FlexOlmoError, match=f"none does not exist: {expected}"):
        open_model(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexOlmoError, match=f"file is a file: {expected}"):
        open_model(tmp_path / "file")
    with pytest.raises(FlexOlmoError, match=f"holds no model: {expected}"):
        open_model(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(FlexOlmoError, match=f"is an expert package, not a model: {expected}"):
        open_model(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FlexOlmoError, match=r"checkpoints has no complete checkpoint: expected a folder step_\* in it"):
        open_model(tmp_path / "run")
    (tmp_path / ".metadata").write_text("")
    with pytest.raises(FlexOlmoError, match="has no flexolmo.json: expected it in a Megatron checkpoint"):
        open_model(tmp_path)


def test_save_model_knows_two_formats(tmp_path):
    with pytest.raises(FlexOlmoError, match="format 'gguf': expected hf or megatron"):
        save_model(lazy_model("dense"), tmp_path / "out", "gguf")


def test_selected_experts_keep_the_order_rows_and_records_of_the_model():
    model = lazy_model("moe", num_experts=4, top_k=3, router_bias=True)
    chosen = select_experts(model, ["law", "code"])
    assert chosen.card.expert_names == ["public", "code", "law"]
    assert chosen.card.experts[2] == model.card.experts[3]
    assert (chosen.card.model.num_experts, chosen.card.model.top_k) == (3, 3)
    prefix = "model.layers.1.mlp."
    for part in ("gate.weight", "gate.bias"):
        rows = model.tensors[prefix + part].read()[[0, 1, 3]]
        assert torch.equal(chosen.tensors[prefix + part].read(), rows)
        assert chosen.tensors[prefix + part].shape == tuple(rows.shape)
    for new, old in enumerate((0, 1, 3)):
        for part in ("gate", "up", "down"):
            assert chosen.tensors[f"{prefix}experts.{new}.{part}_proj.weight"] is model.tensors[
                f"{prefix}experts.{old}.{part}_proj.weight"]
    assert not any(".experts.3." in name for name in chosen.tensors)
    assert chosen.tensors["lm_head.weight"] is model.tensors["lm_head.weight"]


def test_choosing_reads_nothing():
    model = lazy_model("moe")

    def unread():
        raise AssertionError("read")

    model = LazyModel(model.card, {name: LazyTensor(tensor.dtype, tensor.shape, unread)
                                   for name, tensor in model.tensors.items()})
    assert select_experts(model, ["public"]).card.expert_names == ["public"]


def test_top_k_is_at_most_the_number_of_experts_left():
    model = lazy_model("moe", num_experts=4, top_k=3)
    assert select_experts(model, []).card.model.top_k == 1
    assert exclude_experts(model, ["code"]).card.model.top_k == 3
    assert exclude_experts(model, ["code", "law"]).card.expert_names == ["public", "maths"]
    assert model.card.model.top_k == 3


def test_choices_that_cannot_be_made():
    model = lazy_model("moe")
    with pytest.raises(FlexOlmoError, match=r"unknown expert 'coed' \(did you mean 'code'\?\): expected one of public, "
                                            "code, maths"):
        select_experts(model, ["coed"])
    with pytest.raises(FlexOlmoError, match="unknown expert 'law': expected one of public, code, maths"):
        exclude_experts(model, ["law"])
    with pytest.raises(FlexOlmoError, match="expert 'public' cannot be excluded"):
        exclude_experts(model, ["code", "public"])
    for kind in ("dense", "pair"):
        with pytest.raises(FlexOlmoError, match=f"experts can be chosen only from a moe model, this one is {kind}"):
            select_experts(lazy_model(kind), ["code"])
        with pytest.raises(FlexOlmoError, match=f"only from a moe model, this one is {kind}"):
            exclude_experts(lazy_model(kind), ["code"])


@pytest.mark.parametrize("names", [["maths"], []])
def test_a_subset_is_a_smaller_model_for_transformers(tmp_path, names):
    """Whatever the removed weights hold: here NaN."""
    model = lazy_model("moe", top_k=3)
    poisoned = LazyModel(model.card, {
        name: LazyTensor(tensor.dtype, tensor.shape, lambda shape=tensor.shape: torch.full(shape, float("nan")))
        if ".experts.1." in name else tensor for name, tensor in model.tensors.items()})
    save_model(poisoned, tmp_path / "megatron", "megatron")
    save_model(select_experts(open_model(tmp_path / "megatron"), names), tmp_path / "hf", "hf")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    count = len(names) + 1
    assert (loaded.config.num_experts, loaded.config.num_experts_per_tok) == (count, count)
    assert_same_tensors(open_huggingface(tmp_path / "hf"), select_experts(model, names))
    assert bool(loaded(torch.arange(9)[None]).logits.isfinite().all())


def test_watch_counts_every_byte(tmp_path):
    model = lazy_model("moe", dtype=torch.bfloat16)
    seen = []
    save_model(watch(model, seen.append), tmp_path / "out", "megatron")
    assert sum(seen) == total_bytes(model)
    assert total_bytes(model) == sum(tensor.read().nbytes for tensor in model.tensors.values())
