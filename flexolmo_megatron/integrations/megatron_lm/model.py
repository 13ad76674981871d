"""The model provider: builds, fills and freezes before Megatron-LM wraps the model and makes its optimizer."""

import argparse
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.domain.publish import OwnerRouter
from flexolmo_megatron.integrations.cards import check_checkpoints, write_cards
from flexolmo_megatron.integrations.megatron_lm.arguments import LaunchArguments, dense_card
from flexolmo_megatron.model.builder import block_spec, build_model
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig
from flexolmo_megatron.model.spec import TorchSpecProvider, default_backend
from flexolmo_megatron.model.trained_part import TrainedPartModel
from flexolmo_megatron.runtime.ranks import on_first_rank
from flexolmo_megatron.training.freezing import FrozenMark
from flexolmo_megatron.training.start import fill_pair, name_anchor


class ModelProvider:
    """``model_provider`` of Megatron-LM's ``pretrain()``: called once per virtual pipeline stage."""

    def __init__(self, arguments: LaunchArguments) -> None:
        self.arguments = arguments
        self.card: ModelCard | None = None
        self.router: OwnerRouter | None = None
        self.chunks: list[GPTModel] = []
        self.frozen: FrozenMark | None = None
        """Made when training begins."""

    def __call__(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> GPTModel:
        from megatron.training import get_args
        from megatron.training.arguments import core_transformer_config_from_args

        args = get_args()
        stages = 1 if vp_stage is None else args.virtual_pipeline_model_parallel_size
        if len(self.chunks) in (0, stages):  # also when Megatron-LM restarts within the process
            self.chunks, self.frozen = [], None
            self._begin(args)
        expert = self.arguments.plan is not None
        config = core_transformer_config_from_args(args, FlexOlmoTransformerConfig)
        backend = TorchSpecProvider() if args.transformer_impl == "local" else default_backend()
        model = build_model(
            self.card.model,
            self.card.kind,
            config,
            spec=block_spec(self.card.kind, config, backend, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            model_class=TrainedPartModel if expert else GPTModel,
            pg_collection=pg_collection,
        )
        self.chunks.append(model)
        if expert and len(self.chunks) == stages:
            fill_pair(self.chunks, self.arguments.plan.anchor, self.router)
            for chunk in self.chunks:
                _mark_router(chunk)
            self._remember_frozen()
        return model

    def _begin(self, args: argparse.Namespace) -> None:
        """Check the arguments, make the run's card, and check that a checkpoint to go on with is of the same run."""
        self.arguments.check(args)
        if self.arguments.plan is None:
            self.card = dense_card(args)
        else:
            self.card = self.arguments.plan.card
            self.router = name_anchor(self.arguments.plan, self.arguments.config)
        args.flexolmo_card = self.card.to_json()
        on_first_rank(lambda: check_checkpoints(args.save, args.load, self.card))

    def _remember_frozen(self) -> None:
        # Not now: Megatron-LM still converts the model's type.
        def first_forward(*_: Any) -> None:
            handle.remove()
            self.frozen = FrozenMark(self.chunks)

        handle = self.chunks[0].register_forward_pre_hook(first_forward)

    def finish(self) -> None:
        """After training: show that nothing frozen has moved, and write the cards of the checkpoints.

        Raises:
            RuntimeError: a frozen parameter has changed (a defect of this package).
        """
        from megatron.training import get_args, print_rank_0

        if self.frozen is not None:
            self.frozen.check()
            digest = self.arguments.plan.card.anchor_digest
            print_rank_0(f"frozen parameters unchanged, bit by bit; anchor digest {digest}")
        save = get_args().save
        if save and torch.distributed.get_rank() == 0:
            write_cards(Path(save))


def _mark_router(chunk: GPTModel) -> None:
    """Let --decoupled-lr be the learning rate of router rows and biases.

    It is Megatron-LM's one learning rate beside --lr, meant for embedding and head, which are frozen here.
    """
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad and ".router." in name:
            parameter.is_embedding_or_output_parameter = True
