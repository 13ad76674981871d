"""Checkpoints of a pair in another framework's trainer."""

from dataclasses import replace

import pytest
import torch

from flexolmo_megatron.model.builder import block_spec
from flexolmo_megatron.model.config import transformer_config
from flexolmo_megatron.model.trained_part import TrainedPartModel
from flexolmo_megatron.runtime.setup import initialize
from flexolmo_megatron.training.freezing import TRAINED_BY_OWNER, freeze_anchor
from tests.random_models import SIZES


def test_an_owners_checkpoint_holds_what_trains_alone():
    initialize()
    config = transformer_config(replace(SIZES, num_experts=2, top_k=2, router_bias=True), "pair")
    model = TrainedPartModel(config, block_spec("pair", config), vocab_size=SIZES.vocab_size, max_sequence_length=64,
                             share_embeddings_and_output_weights=False, position_embedding_type="rope")
    freeze_anchor(model)
    sharded = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    assert len(sharded) == 2 * 4 and all(TRAINED_BY_OWNER.search(name) for name in sharded)
    row = "decoder.layers.1.mlp.router.row"
    anchor = model.decoder.layers[1].mlp.anchor.linear_fc1.weight.clone()
    state = {name: value for name, value in model.state_dict().items() if name in sharded}
    state[row] = torch.full((1, 32), 2.0)
    model.load_state_dict(state)
    assert torch.equal(model.decoder.layers[1].mlp.router.row, torch.full((1, 32), 2.0))
    assert torch.equal(model.decoder.layers[1].mlp.anchor.linear_fc1.weight, anchor)
    del state[row]
    with pytest.raises(RuntimeError, match=f"the checkpoint and this rank's model differ in {row}"):
        model.load_state_dict(state)
