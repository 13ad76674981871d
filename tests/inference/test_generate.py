"""Text: against logits without a cache, in any batch, sampled, and with its attribution."""

import re
from dataclasses import replace

import pytest
import torch

from flexolmo_megatron.convert.model import save_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.inference.attribution import RoutingWeights
from flexolmo_megatron.inference.generate import Sampling, generate_tokens, kept_tokens
from flexolmo_megatron.inference.model import load_model
from tests.random_models import SIZES, lazy_model, random_model, tensors_of

PROMPTS = ["hello world", "a", "def f(x):\n", "", "some longer text to go on with"]
SETS = [["public"], ["public", "code"], ["public", "code", "law"], ["public", "code", "math", "law"],
        ["public", "math"]]
SETTINGS = [dict(), dict(temperature=1.0, seed=3), dict(temperature=0.8, top_k=20, top_p=0.9)]


def test_greedy_is_the_argmax_without_a_cache(model):
    for prompt, names in zip(PROMPTS, SETS, strict=True):
        tokens = list(prompt.encode()) or [256]
        start = len(tokens)
        for _ in range(12):
            tokens.append(int(model.logits([tokens], names)[0, -1].argmax()))
            if tokens[-1] == 256:
                break
        (answer,) = model.generate(prompt, experts=names, max_new_tokens=12)
        assert answer.prompt == prompt
        assert answer.tokens == [token for token in tokens[start:] if token != 256]
        assert answer.finish == ("eod" if tokens[-1] == 256 else "length")
        assert answer.text == bytes(answer.tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("experts", [None, SETS])
def test_a_prompt_does_not_depend_on_its_batch(model, settings, experts):
    together = model.generate(PROMPTS, experts=experts, max_new_tokens=15, batch_size=5, **settings)
    for batch_size in (1, 2):
        apart = model.generate(PROMPTS, experts=experts, max_new_tokens=15, batch_size=batch_size, **settings)
        for one, other in zip(together, apart, strict=True):
            assert (one.prompt, one.tokens, one.finish) == (other.prompt, other.tokens, other.finish)
            assert one.routing_share == pytest.approx(other.routing_share, abs=1e-5)


def test_a_dense_model_generates_without_attribution(dense):
    answers = dense.generate(PROMPTS, max_new_tokens=5)
    assert [len(answer.tokens) for answer in answers if answer.finish == "length"]
    assert all(answer.routing_share == {} for answer in answers)


def test_seeds(model):
    def sample(seed: int) -> list[list[int]]:
        answers = model.generate(["a", "a"], temperature=1.0, seed=seed, max_new_tokens=20)
        return [answer.tokens for answer in answers]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1)[0] != sample(1)[1], "repeated prompts are different samples"


def test_it_stops_at_the_end_of_the_document(tmp_path):
    lazy = random_model("dense")
    tensors = tensors_of(lazy)
    tensors["lm_head.weight"][256] *= 4  # its logit is then often the largest
    save_model(lazy_model(lazy.card, tensors), tmp_path / "ends", "megatron")
    model = load_model(tmp_path / "ends")
    prompts = [chr(97 + index) for index in range(8)]
    answers = model.generate(prompts, max_new_tokens=30)
    ended = [answer for answer in answers if answer.finish == "eod"]
    assert len(ended) >= 3 and len({len(answer.tokens) for answer in ended}) > 1
    for answer in answers:
        tokens = [*answer.prompt.encode(), *answer.tokens]
        following = model.logits([tokens])[0, -1].argmax()
        assert 256 not in answer.tokens
        assert following == 256 if answer.finish == "eod" else len(answer.tokens) == 30


def test_ids_beyond_the_tokenizer_are_never_chosen(tmp_path):
    lazy = random_model("dense", sizes=replace(SIZES, vocab_size=300))
    tensors = tensors_of(lazy)
    tensors["lm_head.weight"][257:] *= 100
    save_model(lazy_model(lazy.card, tensors), tmp_path / "padded", "megatron")
    model = load_model(tmp_path / "padded")
    assert model.logits([list(b"hello")])[0, -1].argmax() > 256
    for temperature in (0.0, 2.0):
        (answer,) = model.generate("hello", max_new_tokens=20, temperature=temperature)
        assert all(token < 257 for token in answer.tokens)


def test_attribution_is_the_mean_share_of_the_answers_routing(model):
    (answer,) = model.generate("hello world", max_new_tokens=9)
    sequence = [*b"hello world", *answer.tokens][: 11 + 8]  # the last token is never read
    with RoutingWeights(model.module) as routing:
        model.logits([sequence])
        shares_sE = routing.mean_over_layers()[:, 0]
    assert list(answer.routing_share) == model.expert_names
    assert list(answer.routing_share.values()) == pytest.approx(shares_sE[10:].mean(dim=0).tolist(), abs=1e-5)
    assert sum(answer.routing_share.values()) == pytest.approx(1)
    assert model.generate("hello world", max_new_tokens=9)[0].routing_share == answer.routing_share


def test_attribution_gives_excluded_experts_nothing(model):
    answers = model.generate(PROMPTS, experts=SETS, max_new_tokens=6)
    for answer, names in zip(answers, SETS, strict=True):
        assert all(share == 0 for name, share in answer.routing_share.items() if name not in names)
        assert sum(answer.routing_share.values()) == pytest.approx(1)
    assert answers[0].routing_share["public"] == 1


def test_routing_weights_stop_listening(model):
    with RoutingWeights(model.module) as routing:
        model.logits([[1, 2, 3]])
        assert routing.mean_over_layers().shape == (3, 1, 4)
    model.logits([[1, 2, 3, 4]])
    assert routing.mean_over_layers().shape == (3, 1, 4)


def test_temperature_top_k_and_top_p():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()

    def kept(**settings) -> list[int]:
        settings = dict(temperature=1.0) | settings
        probs, ids = kept_tokens(logits, Sampling(**settings))
        return sorted(ids[0][probs[0] > 0].tolist())

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [2, 3] and kept(top_k=1) == [3] and kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.39) == [3] and kept(top_p=0.5) == [2, 3] and kept(top_p=0.71) == [1, 2, 3]
    assert kept(top_p=1e-6) == [3]
    assert kept(top_k=3, top_p=0.75) == [2, 3]  # of the three that top-k leaves: 4/9, 3/9, 2/9
    probs, ids = kept_tokens(logits, Sampling(temperature=0.5))
    torch.testing.assert_close(probs, (torch.tensor([[16.0, 9, 4, 1]]) / 30))
    assert ids.tolist() == [[3, 2, 1, 0]]


def test_a_text_ends_an_answer(model):
    (whole,) = model.generate("hello world", max_new_tokens=20)
    end = whole.text[6:8]
    (answer,) = generate_tokens(model, [list(b"hello world")], Sampling(max_new_tokens=20), seeds=[0],
                                stop=["not there", end])
    assert answer.finish == "stop" and answer.text == whole.text[:whole.text.index(end)]
    assert whole.tokens[:len(answer.tokens)] == answer.tokens and len(answer.tokens) < 20


def test_sampling_follows_the_probabilities(model):
    probs = model.logits([list(b"abc")])[0, -1].softmax(dim=-1)
    answers = model.generate(["abc"] * 2000, temperature=1.0, max_new_tokens=1, batch_size=2000)
    first = torch.tensor([answer.tokens[0] if answer.tokens else 256 for answer in answers])
    share = (first == probs.argmax()).float().mean().item()
    expected = probs.max().item()
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


def test_progress_counts_tokens(model):
    steps = []
    answers = model.generate(["a", "bc"], max_new_tokens=4, progress=steps.append)
    assert sum(steps) == sum(len(answer.tokens) + (answer.finish == "eod") for answer in answers)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(max_new_tokens=0), "max_new_tokens = 0: expected at least 1"),
    (dict(temperature=-0.5), "temperature = -0.5: expected 0 (greedy) or more"),
    (dict(temperature=float("nan")), "temperature = nan: expected 0 (greedy) or more"),
    (dict(top_k=-1), "top_k = -1: expected 0 (all tokens) or more"),
    (dict(top_p=0.0), "top_p = 0.0: expected a probability above 0, at most 1"),
    (dict(top_p=1.5), "top_p = 1.5: expected a probability above 0, at most 1"),
    (dict(seed=-1), "seed = -1: expected 0 to 4294967295"),
    (dict(seed=2**64), "seed = 18446744073709551616: expected 0 to 4294967295"),
    (dict(max_new_tokens=2.5), "max_new_tokens = 2.5: expected a whole number"),
    (dict(max_new_tokens=None), "max_new_tokens = None: expected a whole number"),
    (dict(temperature="hot"), "temperature = 'hot': expected a number"),
    (dict(top_k=True), "top_k = True: expected a whole number"),
    (dict(batch_size="8"), "batch_size = '8': expected at least 1"),
    (dict(batch_size=0), "batch_size = 0: expected at least 1"),
    (dict(max_new_tokens=60), "prompt 1 has 5 tokens, with max_new_tokens = 60 that is 65: expected at most "
                              "model.max_position_embeddings = 64"),
    (dict(experts=["public", "none"], max_new_tokens=5), "unknown expert 'none'"),
])
def test_impossible_settings_are_refused(model, settings, message):
    with pytest.raises(FlexOlmoError, match=re.escape(message)):
        model.generate("hello", **settings)


def test_prompts_must_be_texts(model):
    with pytest.raises(FlexOlmoError, match="prompts = None: expected a text or a list of texts"):
        model.generate(None)
    with pytest.raises(FlexOlmoError, match=re.escape("prompts[1] = 3: expected a text")):
        model.generate(["a", 3], max_new_tokens=5)
    with pytest.raises(FlexOlmoError, match=re.escape("prompts[0] = 'a\\udcff': expected text that UTF-8 can hold")):
        model.generate("a\udcff", max_new_tokens=5)


def test_no_prompts_give_no_answers(model):
    assert model.generate([]) == []


def test_damaged_weights_are_reported(tmp_path):
    lazy = random_model("dense")
    tensors = tensors_of(lazy)
    tensors["model.norm.weight"][3] = float("nan")
    save_model(lazy_model(lazy.card, tensors), tmp_path / "damaged", "megatron")
    with pytest.raises(FlexOlmoError, match="the model's logits are not finite numbers"):
        load_model(tmp_path / "damaged").generate("a", max_new_tokens=5)
