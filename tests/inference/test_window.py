"""Answers of a model whose routing logits are averaged over a window, which begins within the prompt."""

import pytest
import torch

from flexolmo_megatron.convert.model import exclude_experts, save_model
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.inference.access import routers_of
from flexolmo_megatron.inference.model import Model, load_model
from tests.random_models import random_model

PROMPTS = ["hello world", "a", "def f(x):\n", "", "some longer text to go on with"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A merged model with a window of 5, and the same without the expert math."""
    folder, merged = tmp_path_factory.mktemp("window"), random_model("moe", 4, 2, bias=True, window=5)
    save_model(merged, folder / "merged", "megatron")
    save_model(exclude_experts(merged, ["math"]), folder / "without", "megatron")
    return folder


@pytest.fixture(scope="module")
def model(paths) -> Model:
    return load_model(paths / "merged")


def test_the_window_matters(model):
    tokens = [list(b"some text that is longer than the window")]
    averaged = model.logits(tokens)
    for router in routers_of(model.module):
        router.config.router_window = 1
    try:
        assert not torch.allclose(averaged, model.logits(tokens), atol=1e-2)
    finally:
        for router in routers_of(model.module):
            router.config.router_window = 5


def test_an_answer_is_the_argmax_without_a_cache_in_any_batch(model):
    together = model.generate(PROMPTS, max_new_tokens=12, batch_size=5)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        tokens = list(prompt.encode()) or [256]
        start = len(tokens)
        for _ in range(12):
            tokens.append(int(model.logits([tokens])[0, -1].argmax()))
            if tokens[-1] == 256:
                break
        assert answer.tokens == [token for token in tokens[start:] if token != 256]
        (alone,) = model.generate(prompt, max_new_tokens=12)
        assert alone.tokens == answer.tokens
        assert alone.routing_share == pytest.approx(answer.routing_share, abs=1e-5)
    assert all(router.history is None for router in routers_of(model.module))


def test_other_generators_are_refused(model):
    """Steps of one token would each be a window of their own."""
    from megatron.core.inference.contexts import StaticInferenceContext

    tokens_bs = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), pytest.raises(FlexOlmoError, match="^router_window = 5 with a key/value cache: expected 1; "):
        model.module(tokens_bs, torch.arange(3)[None], None, inference_context=StaticInferenceContext(1, 8))
    layer, hidden_sbh = model.module.decoder.layers[0], torch.zeros(3, 1, model.config.hidden_size)
    with pytest.raises(FlexOlmoError, match="^router_window = 5 with packed sequences: expected 1; "):
        layer(hidden_sbh, packed_seq_params=object())


def test_left_out_is_as_if_it_were_not_there(model, paths):
    tokens = [list(b"some text that is longer than the window"), list(b"another text of the very same length ...")]
    rest = model.experts_without("math")
    without = load_model(paths / "without")
    assert torch.equal(model.logits(tokens, rest), without.logits(tokens))
    answers = [owner.generate(PROMPTS, max_new_tokens=8, **options)
               for owner, options in ((model, dict(experts=rest)), (without, {}))]
    assert [answer.tokens for answer in answers[0]] == [answer.tokens for answer in answers[1]]
