"""Building the GPTModel of megatron-core with our layer spec."""

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from flexolmo_megatron.config.layout import ModelKind
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig
from flexolmo_megatron.model.spec import default_backend, layer_spec


def block_spec(
    kind: ModelKind,
    config: FlexOlmoTransformerConfig,
    backend: BackendSpecProvider | None = None,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's layers and of the final norm.

    Args:
        kind: dense, pair or moe.
        config: from ``transformer_config``.
        backend: Megatron's provider of modules; None picks Transformer Engine where it is installed.
        vp_stage: virtual pipeline stage.
    """
    backend = backend or default_backend()
    layers = [layer_spec(kind, backend)] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layers, backend.layer_norm(rms_norm=True))


def build_model(
    model: ModelConfig,
    kind: ModelKind,
    config: FlexOlmoTransformerConfig,
    *,
    spec: TransformerBlockSubmodules | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    model_class: type[GPTModel] = GPTModel,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """Build this rank's part of a model, with random weights.

    Args:
        model: the architecture.
        kind: dense, pair or moe.
        config: from ``transformer_config``.
        spec: of the decoder's layers; None for ``block_spec(kind, config)``.
        pre_process: whether this pipeline stage has the embedding.
        post_process: whether this pipeline stage has the final norm and the output layer.
        vp_stage: virtual pipeline stage.
        model_class: GPTModel, or a class that is made as it is.
        pg_collection: process groups; None for those of ``parallel_state``.
    """
    return model_class(
        config,
        transformer_layer_spec=spec or block_spec(kind, config, vp_stage=vp_stage),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
