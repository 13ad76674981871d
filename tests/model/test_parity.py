"""Logits of transformers' models against ours, from the directory that ``save_pretrained`` writes; fp32 on the CPU.

The tolerance of 2e-4 leaves room for another CPU's rounding; differences here are about 1e-5 for logits up to 7.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, Olmo2Config, Olmo2ForCausalLM, PreTrainedModel

from flexolmo_megatron import load_model
from flexolmo_megatron.inference.attribution import RoutingWeights
from tests.random_models import random_tensor

TOLERANCE = 2e-4
VOCABULARY = 97
MOE_CASES = [(experts, top_k, groups) for experts in (2, 3, 7, 8)
             for top_k in sorted({k for k in (1, 2, 4, experts) if k <= experts}) for groups in (4, 2)]


def _random(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape), generator))
    return model.float().eval()


def _sizes(groups: int) -> dict[str, Any]:
    return dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=groups, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=500_000.0,
                tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None)


def _compare(theirs: PreTrainedModel, path: Path, record_property: Any) -> Any:
    theirs.save_pretrained(path)
    ours = load_model(path)
    for batch, length in ((3, 37), (2, 1)):
        tokens = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = theirs(tokens).logits
        for exact in (True, False):
            logits = ours.logits(tokens, exact=exact)
            difference = (logits - expected).abs().max().item()
            record_property("largest_difference", difference)
            assert logits.dtype == torch.float32 and logits.shape == (batch, length, VOCABULARY)
            assert difference <= TOLERANCE
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
            assert expected.std() > 0.5, "logits too alike to tell models apart"
    return ours


@pytest.mark.parametrize(("experts", "top_k", "groups"), MOE_CASES)
def test_flexolmo(experts, top_k, groups, tmp_path, record_property):
    config = FlexOlmoConfig(num_experts=experts, num_experts_per_tok=top_k, **_sizes(groups))
    ours = _compare(_random(FlexOlmoForCausalLM(config)), tmp_path, record_property)
    assert ours.expert_names == ["public", *(f"expert_{index}" for index in range(1, experts))]
    with RoutingWeights(ours.module) as routing:
        ours.logits(torch.arange(VOCABULARY)[:64, None], exact=False)
        shares_tokens = routing.mean_over_layers().flatten(0, 1)
    assert (shares_tokens.mean(dim=0) > 0.01).all(), "an expert is never chosen, so it is not compared"
    if top_k > 1:
        assert shares_tokens.max(dim=1).values.mean() < 0.95, "one expert takes all weight"


@pytest.mark.parametrize("groups", [4, 2])
def test_olmo2(groups, tmp_path, record_property):
    ours = _compare(_random(Olmo2ForCausalLM(Olmo2Config(**_sizes(groups)))), tmp_path, record_property)
    assert ours.expert_names == []
