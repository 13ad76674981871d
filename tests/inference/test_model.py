"""Loading every kind of model, and the checks of what is asked of it."""

import contextlib
import re
import shutil
import threading
from dataclasses import replace

import pytest
import torch

import flexolmo_megatron
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import save_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.exchange.merge import merge
from flexolmo_megatron.exchange.package import pack
from flexolmo_megatron.exchange.verify import verify
from flexolmo_megatron.inference.model import load_model
from tests.random_models import SIZES, random_model

TOKENS = torch.randint(SIZES.vocab_size, (2, 13), generator=torch.Generator().manual_seed(0))


def test_what_a_model_says_about_itself(model):
    assert model.expert_names == ["public", "code", "math", "law"]
    assert model.config == model.card.model and model.config.num_experts == 4
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    logits = model.logits(TOKENS)
    assert logits.shape == (2, 13, SIZES.vocab_size) and logits.dtype == torch.float32 and not logits.requires_grad


def test_a_model_shows_what_it_is(model, dense):
    assert repr(model) == "<Model: 2 layers, experts public, code, math, law (2 active), on cpu>"
    assert repr(dense) == "<Model: 2 layers, dense, on cpu>"


def test_another_thread_can_use_the_model(model):
    expected, result = model.logits(TOKENS), []
    thread = threading.Thread(target=lambda: result.append(model.logits(TOKENS)))
    thread.start()
    thread.join()
    assert torch.equal(result[0], expected)


def test_the_packages_own_load_model_takes_type_and_anchor(merged_path, model):
    loaded = flexolmo_megatron.load_model(merged_path, torch.bfloat16, anchor="of no use here")
    assert next(loaded.module.parameters()).dtype == torch.bfloat16
    assert torch.equal(flexolmo_megatron.load_model(merged_path).logits(TOKENS), model.logits(TOKENS))


def test_a_large_vocabulary_without_a_tokenizer_is_not_taken_for_bytes(tmp_path):
    for size in (257, 512, 513):
        save_model(random_model("dense", sizes=replace(SIZES, vocab_size=size)), tmp_path / str(size), "hf")
        (tmp_path / str(size) / "flexolmo.json").unlink()
    assert len(load_model(tmp_path / "512").generate("a", max_new_tokens=3)) == 1
    model = load_model(tmp_path / "513")
    assert model.logits(TOKENS).shape == (2, 13, 513)
    with pytest.raises(FlexOlmoError, match="cannot load the tokenizer '.*/513': expected 'byte', a folder with"):
        model.generate("a")


def test_layouts_on_disk_give_the_same_logits(tmp_path):
    lazy = random_model("moe", 3, 2)
    save_model(lazy, tmp_path / "hf", "hf")
    save_model(lazy, tmp_path / "run" / "checkpoints" / "step_00000020", "megatron")
    save_model(random_model("moe", 3, 2, seed=9), tmp_path / "run" / "checkpoints" / "step_00000010", "megatron")
    from_hf = flexolmo_megatron.load_model(tmp_path / "hf").logits(TOKENS)
    assert torch.equal(from_hf, flexolmo_megatron.load_model(str(tmp_path / "run")).logits(TOKENS))


def test_bf16(merged_path, model):
    rounded = load_model(merged_path, torch.bfloat16)
    logits = rounded.logits(TOKENS)
    assert logits.dtype == torch.float32
    assert next(rounded.module.parameters()).dtype == torch.bfloat16
    assert (logits - model.logits(TOKENS)).abs().mean() < 0.1


def test_other_types_are_refused(merged_path):
    with pytest.raises(FlexOlmoError, match="dtype = torch.float16: expected torch.float32 or torch.bfloat16"):
        load_model(merged_path, torch.float16)


def test_a_missing_model_is_one_sentence(tmp_path):
    with pytest.raises(FlexOlmoError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(("tokens", "message"), [
    (torch.tensor([1, 2, 3]), "tokens of shape [3]: expected [b, s], sequences by positions"),
    (torch.zeros(1, 2, 3, dtype=torch.int64), "tokens of shape [1, 2, 3]: expected [b, s]"),
    (torch.zeros(0, 5, dtype=torch.int64), "tokens of shape [0, 5] are empty: expected at least one token"),
    (torch.zeros(2, 0, dtype=torch.int64), "tokens of shape [2, 0] are empty"),
    ([], "tokens of shape [0] are empty"),
    ([[1, 2], [3]], "tokens cannot be made a tensor of token ids of shape [b, s]"),
    ("text", "tokens cannot be made a tensor of token ids of shape [b, s]"),
    (torch.ones(1, 3), "tokens of type torch.float32: expected integers"),
    (torch.ones(1, 3, dtype=torch.bool), "tokens of type torch.bool: expected integers"),
    ([[1, 2], [3, 257]], "token id 257 in sequence 1 at position 1: expected 0 to 256, the model's vocabulary"),
    ([[1, -1]], "token id -1 in sequence 0 at position 1: expected 0 to 256"),
    (torch.zeros(1, 65, dtype=torch.int64), "sequences of 65 tokens: expected at most model.max_position_emb"),
])
def test_impossible_tokens_are_refused(model, tokens, message):
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        model.logits(tokens)


def test_tokens_may_be_lists_or_small_integers(model):
    expected = model.logits(TOKENS)
    assert torch.equal(model.logits(TOKENS.tolist()), expected)
    assert torch.equal(model.logits(TOKENS.to(torch.int32)), expected)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    save_model(random_model("dense", sizes=replace(SIZES, vocab_size=200)), tmp_path / "small", "megatron")
    with pytest.raises(FlexOlmoError, match="has 257 ids: expected at most model.vocab_size = 200"):
        load_model(tmp_path / "small").generate("a")


@pytest.fixture
def pair(tmp_path) -> LazyModel:
    """A pair with a narrower expert, a bias and a window, whose anchor is at ``tmp_path / "anchor"``."""
    anchor = random_model("moe", 1, 1)
    save_model(anchor, tmp_path / "anchor", "megatron")
    lazy = random_model("pair", 2, 2, seed=1, bias=True, window=3, sizes=replace(SIZES, ffn_hidden_size=20))
    return replace(lazy, card=replace(lazy.card, anchor_digest=model_digest(anchor),
                                      anchor_path=str(tmp_path / "anchor"), training={"steps": 3}))


def test_a_pair_is_the_merged_model_of_its_package(pair, tmp_path):
    save_model(pair, tmp_path / "pair", "megatron")
    model = load_model(tmp_path / "pair")
    assert model.card.kind == "moe" and model.expert_names == ["public", "code"]
    assert model.config.top_k == 2 and model.config.ffn_hidden_size == SIZES.ffn_hidden_size

    from flexolmo_megatron.convert.model import open_model

    anchor = open_model(tmp_path / "anchor")
    pack(pair, None, tmp_path / "package", name="code", owner="o", licence="l", contact="c")
    save_model(merge(anchor, [verify(tmp_path / "package", anchor)]), tmp_path / "merged", "megatron")
    assert torch.equal(model.logits(TOKENS), load_model(tmp_path / "merged").logits(TOKENS))
    assert not torch.equal(model.logits(TOKENS), model.logits(TOKENS, ["public"]))


def test_a_moved_anchor_can_be_named(pair, tmp_path):
    gone = {"type": "huggingface", "path": str(tmp_path / "anchor")}  # its tokenizer was in its folder
    save_model(replace(pair, card=replace(pair.card, tokenizer=gone)), tmp_path / "pair", "megatron")
    shutil.move(tmp_path / "anchor", tmp_path / "moved")
    with pytest.raises(FlexOlmoError, match="a pair needs the anchor that it was trained .*anchor does not exist"):
        load_model(tmp_path / "pair")
    model = load_model(tmp_path / "pair", anchor=tmp_path / "moved")
    assert model.expert_names == ["public", "code"] and model.tokenizer.spec == {"type": "byte"}


def test_another_anchor_is_refused(pair, tmp_path):
    save_model(pair, tmp_path / "pair", "megatron")
    save_model(random_model("moe", 1, 1, seed=5), tmp_path / "other", "megatron")
    with pytest.raises(FlexOlmoError, match=f"other has the digest .* the pair's anchor, {pair.card.anchor_digest}"):
        load_model(tmp_path / "pair", anchor=tmp_path / "other")
    save_model(random_model("dense"), tmp_path / "dense", "megatron")
    with pytest.raises(FlexOlmoError, match="dense is a dense model with 0 experts: expected the pair's anchor"):
        load_model(tmp_path / "pair", anchor=tmp_path / "dense")


def test_the_anchors_tensors_with_other_constants_are_refused(pair, tmp_path):
    from flexolmo_megatron.convert.model import open_model

    save_model(pair, tmp_path / "pair", "megatron")
    anchor = open_model(tmp_path / "anchor")
    model = replace(anchor.card.model, rotary_base=10_000.0)
    save_model(replace(anchor, card=replace(anchor.card, model=model)), tmp_path / "other", "megatron")
    with pytest.raises(FlexOlmoError, match="other has rotary_base = 10000.0: the pair was trained with 500000.0"):
        load_model(tmp_path / "pair", anchor=tmp_path / "other")


def test_a_pair_that_does_not_know_its_anchor(pair, tmp_path):
    save_model(replace(pair, card=replace(pair.card, anchor_path=None)), tmp_path / "pair", "megatron")
    with pytest.raises(FlexOlmoError, match="the pair's card has no anchor_path"):
        load_model(tmp_path / "pair")


def test_a_gpu_is_asked_for_a_fixed_order_of_sums(monkeypatch):
    from flexolmo_megatron.inference.fixed_order import fixed_order

    def asked() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    with fixed_order():
        assert asked() == (False, False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(KeyError), fixed_order():
        assert asked() == (True, True)
        raise KeyError
    assert asked() == (False, False)


def test_logits_and_texts_are_computed_in_a_fixed_order(model, monkeypatch):
    inside, seen = [], []

    @contextlib.contextmanager
    def block():
        inside.append(True)
        yield
        inside.pop()

    for module in ("model", "generate"):
        monkeypatch.setattr(f"flexolmo_megatron.inference.{module}.fixed_order", block)
    hook = model.module.register_forward_pre_hook(lambda *_: seen.append(bool(inside)))
    model.logits(TOKENS)
    model.generate("a", max_new_tokens=2)
    hook.remove()
    assert len(seen) >= 2 + 1 and all(seen) and not inside
