"""A model with a tuned router answers with the rows that keep the strict guarantee, and says which."""

import json
from dataclasses import replace

import pytest
import torch

from flexolmo_megatron import load_model
from flexolmo_megatron.cli import main
from flexolmo_megatron.config.card import RowSet
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import save_model, select_experts
from flexolmo_megatron.convert.rows import is_row, untuned, use_rows
from flexolmo_megatron.errors import FlexOlmoError
from tests.random_models import random_model

EXACT = dict(rtol=0, atol=1e-6, equal_nan=False)
OWNERS = ["code", "math", "law"]
ALL, NO_CODE, NO_MATH = (["public", *(name for name in OWNERS if name != out)] for out in ("", "code", "math"))


def tuned_model() -> LazyModel:
    """Experts public, code, math and law; tuned rows with all, tuned rows without math, untuned rows."""
    def rows(seed: int) -> dict:
        return {name: t for name, t in random_model("moe", 4, 2, bias=True, seed=seed).tensors.items() if is_row(name)}

    model = random_model("moe", 4, 2, bias=True)
    others = ["code", "law"]
    sets = [RowSet("tuned", OWNERS, OWNERS), RowSet("without-math", others, others), RowSet("untuned")]
    return LazyModel(replace(model.card, row_sets=sets), model.tensors | rows(1), {"without-math": rows(2),
                                                                                  "untuned": rows(0)})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tuned"
    save_model(tuned_model(), path, "megatron")
    return path


@pytest.fixture(scope="module")
def model(path):
    return load_model(path)


def tokens(batch):
    return torch.randint(257, (batch, 13), generator=torch.Generator().manual_seed(3))


def physical(lazy: LazyModel, names, path) -> torch.Tensor:
    """Logits of a model on disk without the other experts and without any other set of rows."""
    lazy = select_experts(lazy, names)
    save_model(LazyModel(replace(lazy.card, row_sets=[]), lazy.tensors), path, "megatron")
    return load_model(path).logits(tokens(3))


def test_without_a_set_of_its_own_it_is_bitwise_the_model_that_never_had_the_expert(model, tmp_path):
    never = physical(untuned(tuned_model()), NO_CODE, tmp_path / "never")
    ours = model.logits(tokens(3), NO_CODE)
    torch.testing.assert_close(ours, never, **EXACT)
    assert (ours - load_model_tuned(model, NO_CODE)).abs().max() > 1e-3
    assert model.rows_used(NO_CODE) == "untuned (strict)"


def load_model_tuned(model, experts):
    """Logits with the tuned rows kept."""
    model.rows = "tuned"
    try:
        return model.logits(tokens(3), experts)
    finally:
        model.rows = "strict"


def test_a_set_that_was_tuned_without_the_owner_is_used(model, tmp_path):
    expected = physical(use_rows(tuned_model(), "without-math"), NO_MATH, tmp_path / "without")
    torch.testing.assert_close(model.logits(tokens(3), NO_MATH), expected, **EXACT)
    assert model.rows_used(NO_MATH) == "without-math (strict)"


def test_by_choice_tuned_rows_stay(path, tmp_path):
    kept = load_model(path, rows="tuned")
    lazy = tuned_model()
    expected = physical(LazyModel(replace(lazy.card, row_sets=[]), lazy.tensors), NO_CODE, tmp_path / "kept")
    torch.testing.assert_close(kept.logits(tokens(3), NO_CODE), expected, **EXACT)
    assert kept.rows_used(NO_CODE) == "tuned (expert-only)" and kept.rows_used() == "tuned"


def test_by_choice_untuned_rows_are_used_for_all(path, tmp_path):
    expected = physical(untuned(tuned_model()), ALL, tmp_path / "untuned")
    before = load_model(path, rows="untuned")
    torch.testing.assert_close(before.logits(tokens(3)), expected, **EXACT)
    assert before.rows_used() == "untuned"
    with pytest.raises(FlexOlmoError, match="rows = 'best': expected one of strict, tuned, untuned"):
        load_model(path, rows="best")


@pytest.mark.parametrize("exact", [True, False])
def test_sequences_of_one_batch_use_different_rows(model, exact):
    batch, sets = tokens(4), [NO_MATH, ALL, NO_CODE, NO_MATH]
    together = model.logits(batch, sets, exact=exact)
    for row, names in enumerate(sets):
        alone = model.logits(batch[row:row + 1], names)
        torch.testing.assert_close(together[row:row + 1], alone, rtol=0, atol=1e-6 if exact else 5e-5)
    assert torch.equal(model.logits(batch[1:2]), model.logits(batch[1:2], ALL)), "the model's own rows are back"


def test_own_rows_are_back_after_an_error(model):
    from flexolmo_megatron.inference.access import using_rows

    before = model.logits(tokens(1))
    ((untuned_rows, _),) = model.by_rows(torch.tensor([[True, False, True, True]]), 1)
    with pytest.raises(ZeroDivisionError), using_rows(model.module, untuned_rows):
        assert not torch.equal(model.logits(tokens(1), exact=False), before)
        raise ZeroDivisionError
    assert torch.equal(model.logits(tokens(1)), before)


def test_generation_uses_the_same_rows_and_says_so(model):
    prompts = ["one", "two more", "three"]
    sets = [NO_CODE, ALL, NO_MATH]
    found = model.generate(prompts, experts=sets, max_new_tokens=5)
    assert [answer.prompt for answer in found] == prompts
    assert [answer.rows for answer in found] == ["untuned (strict)", "tuned", "without-math (strict)"]
    for answer, prompt, names in zip(found, prompts, sets, strict=True):
        (alone,) = model.generate(prompt, experts=names, max_new_tokens=5)
        ids = torch.tensor([list(prompt.encode()) + answer.tokens])
        greedy = model.logits(ids, names)[0, len(prompt) - 1:-1, :257].argmax(dim=-1).tolist()
        assert answer.tokens == alone.tokens == greedy[:len(answer.tokens)]


def test_commands_say_which_rows(path, tmp_path, capsys):
    ask = ["generate", str(path), "--prompt", "abc", "--max-new-tokens", "2"]
    for more, expected in ((["--exclude", "code"], "router rows: untuned (strict); "),
                           (["--exclude", "math"], "router rows: without-math (strict); "),
                           (["--exclude", "math", "--rows", "tuned"], "router rows: tuned (expert-only); "),
                           ([], "router rows: tuned; ")):
        assert main([*ask, *more]) == 0
        assert expected in capsys.readouterr().out
    assert main([*ask, "--json", "--exclude", "math"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == "without-math (strict)"
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    assert main(["eval", "--model", f"all={path}", "--model", f"less={path}@-code", "--domain", f"a={tmp_path}/a.jsonl",
                 "--out", f"{tmp_path}/out"]) == 0
    assert "less: router rows untuned (strict)" in capsys.readouterr().err
    models = json.loads((tmp_path / "out" / "results.json").read_text())["setup"]["models"]
    assert [models[name]["rows"] for name in ("all", "less")] == ["tuned", "untuned (strict)"]


def test_a_model_that_was_not_tuned_says_nothing(merged_path, capsys):
    assert main(["generate", str(merged_path), "--prompt", "abc", "--max-new-tokens", "2", "--exclude", "code"]) == 0
    assert "router rows" not in capsys.readouterr().out
