"""Building the GPTModel of megatron-core with our layer spec."""

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig, ModelKind
from flexolmo_megatron.model.spec import default_backend, layer_spec


def build_model(
    model: ModelConfig,
    kind: ModelKind,
    config: FlexOlmoTransformerConfig,
    *,
    backend: BackendSpecProvider | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build this rank's part of a model, with random weights.

    Args:
        model: the architecture.
        kind: dense, pair or moe.
        config: from ``transformer_config``.
        backend: where modules come from; None picks Transformer Engine where installed.
        pre_process: whether this pipeline stage has the embedding.
        post_process: whether this pipeline stage has the final norm and the output layer.
        vp_stage: virtual pipeline stage.
    """
    backend = backend or default_backend()
    spec = TransformerBlockSubmodules(
        layer_specs=[layer_spec(kind, backend)] * get_num_layers_to_build(config, vp_stage),
        layer_norm=backend.layer_norm(rms_norm=True),
    )
    return GPTModel(
        config,
        transformer_layer_spec=spec,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
