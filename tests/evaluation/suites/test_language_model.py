"""Our side of the harness's interface gives what its own HFLM gives for the exported model."""

import pytest

from flexolmo_megatron.inference.model import load_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.api.instance import Instance  # noqa: E402

from flexolmo_megatron.evaluation.suites.language_model import HarnessModel  # noqa: E402

PAIRS = [("the cat sat", " on a mat"), ("the cat sat", " in"), ("", "hello"), ("a ", "b"), ("x = ", "1\n"),
         ("long " * 250, "and a continuation"), ("only", " long" * 190)]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, values, index) for index, values in enumerate(arguments)]


@pytest.fixture(scope="module")
def ours(models):
    return HarnessModel(load_model(models["merged"]), batch_size=3)


@pytest.fixture(scope="module")
def theirs(models):
    pytest.importorskip("accelerate", reason="HFLM needs accelerate and peft")
    pytest.importorskip("peft", reason="HFLM needs accelerate and peft")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(models["export"]), device="cpu", dtype="float32", batch_size=2, max_length=1024)


def test_log_likelihoods(ours, theirs):
    requests, before = instances("loglikelihood", PAIRS), ours.truncated
    for pair, (value, greedy), (expected, expected_greedy) in zip(
            PAIRS, ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True),
            strict=True):
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-4), pair
        assert greedy == expected_greedy
    assert ours.truncated - before == sum(len("".join(pair)) > 1024 + 1 for pair in PAIRS) == 1


def test_rolling_log_likelihoods(ours, theirs):
    requests = instances("loglikelihood_rolling", [("a text of a few words",), ("a longer text, " * 100,)])
    values = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert values == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-6, abs=1e-4)


def test_greedy_continuations(ours, theirs):
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    requests = instances("generate_until", [(text, settings) for text in ("the cat", "a much longer prompt", "x")])
    mine, expected = (lm.generate_until(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert mine == expected and all(mine)
    stop = mine[0][4:6]
    requests = instances("generate_until", [("the cat", settings | {"until": [stop]})])
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests, disable_tqdm=True)[0] == mine[0][:mine[0].index(stop)]


def test_prompts_without_room_lose_their_beginning(ours):
    settings, before = {"until": [], "max_gen_toks": 4, "do_sample": False}, ours.truncated
    texts = ["x" * 5 + "y" * 1020, "y" * 1020, "y"]
    answers = ours.generate_until(instances("generate_until", [(text, settings) for text in texts]), True)
    assert answers[0] == answers[1] and ours.truncated - before == 1


def test_experts_that_are_left_out_have_no_part(models, ours):
    requests = instances("loglikelihood", PAIRS[:2])
    without = HarnessModel(ours.model, ["public", "math"]).loglikelihood(requests, disable_tqdm=True)
    tokens = [list(map(ours.model.tokenizer.encode, pair)) for pair in PAIRS[:2]]
    for (value, _), (context, continuation) in zip(without, tokens, strict=True):
        logits = ours.model.logits([context + continuation[:-1]], ["public", "math"])[0].log_softmax(-1)
        expected = sum(logits[len(context) - 1 + place, token].item() for place, token in enumerate(continuation))
        assert value == pytest.approx(expected, abs=1e-4)
    assert [value for value, _ in without] != pytest.approx(
        [value for value, _ in ours.loglikelihood(requests, disable_tqdm=True)], abs=1e-2)


def test_samples_follow_from_seed_and_prompt(ours):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    prompts = ["one", "two", "two", "three and more"]
    together = ours.generate_until(instances("generate_until", [(text, settings) for text in prompts]), True)
    assert together[1] != together[2], "repeats of a prompt are different samples"
    alone = ours.generate_until(instances("generate_until", [("three and more", settings)]), True)
    assert alone == together[3:]
    other = HarnessModel(ours.model, seed=1).generate_until(instances("generate_until", [("one", settings)]), True)
    assert other != together[:1]
