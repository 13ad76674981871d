"""NeMo's importers and exporters, ``hf`` (Hugging Face) and ``flexolmo`` (checkpoints of this package).

Both importers take whatever ``flexolmo_megatron.load_model`` takes, but no pair. A pair is exported as ``flexolmo``,
which `flexolmo pack` reads; a tuned router as well, with the rows that the merged model had before.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict
from nemo.lightning import MegatronStrategy, Trainer, io, teardown
from nemo.lightning.io.pl import ckpt_to_weights_subdir

from flexolmo_megatron.config.card import CARD_FILE, TUNED, ModelCard, RowSet
from flexolmo_megatron.convert.huggingface import save_huggingface
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.megatron_writer import save_megatron
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.names import expected_tensors
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.integrations.nemo.model import FlexOlmoConfig, FlexOlmoModel, sizes
from flexolmo_megatron.model.weights import live_model, load_weights
from flexolmo_megatron.training.router_run import write_tuned_model
from flexolmo_megatron.training.start import name_anchor


@io.model_importer(FlexOlmoModel, "hf")
@io.model_importer(FlexOlmoModel, "flexolmo")
class Importer(io.ModelConnector[LazyModel, FlexOlmoModel]):
    """From a Hugging Face directory, a merged model, an anchor or a run to a NeMo checkpoint."""

    def init(self) -> FlexOlmoModel:
        return FlexOlmoModel(self.config, tokenizer=self.tokenizer)

    def apply(self, output_path: Path) -> Path:
        """Convert on the CPU, one tensor at a time beside the model; nothing changes type."""
        target = self.init()
        trainer = self.nemo_setup(target, ckpt_async_save=False)
        source = open_model(str(self))
        load_weights(target.module, source)
        self.nemo_save(output_path, trainer)
        source.card.save(Path(output_path))
        teardown(trainer, target)
        return output_path

    @property
    def config(self) -> FlexOlmoConfig:
        """The configuration of the model on disk."""
        source = open_model(str(self))
        if source.card.kind == "pair":
            raise FlexOlmoError(f"{self} is a pair, which holds what its owner trained alone: expected a whole model")
        dtype = source.tensors["lm_head.weight"].dtype
        return FlexOlmoConfig(kind=source.card.kind, params_dtype=dtype, bf16=dtype.itemsize == 2,
                              seq_length=source.card.model.max_position_embeddings, **sizes(source.card))

    @property
    def tokenizer(self) -> Any:
        """NeMo's view of the model's tokenizer; None for bytes, of which NeMo has no tokenizer."""
        found = open_model(str(self)).card.tokenizer
        if found["type"] != "huggingface":
            return None
        from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

        return AutoTokenizer(found["path"])


class _Exporter(io.ModelConnector[FlexOlmoModel, LazyModel]):
    def nemo_load(self, path: Path, trainer: Trainer | None = None, cpu: bool = True) -> tuple[FlexOlmoModel, Trainer]:
        """NeMo's, with a strategy that does not ask for asynchronous saving, for which core 0.16 lacks a module."""
        strategy = MegatronStrategy(ddp="pytorch", setup_optimizers=False, ckpt_async_save=False)
        trainer = trainer or Trainer(devices=1, accelerator="cpu" if cpu else "gpu", strategy=strategy)
        return super().nemo_load(path, trainer, cpu)

    def read(self) -> tuple[FlexOlmoModel, Trainer, LazyModel]:
        """Load the NeMo checkpoint; the last value views its tensors by their canonical names."""
        model, trainer = self.nemo_load(Path(str(self)))
        return model, trainer, live_model(model.module, self._card(model.config, model.optim.config))

    def _card(self, config: FlexOlmoConfig, optimizer: Any) -> ModelCard:
        if (Path(str(self)) / CARD_FILE).exists():  # imported, never trained
            return ModelCard.load(Path(str(self)))
        if config.kind == "pair":
            options, planned = config.plan()
            name_anchor(planned, options)
            card = planned.card
        else:
            card = config.card()
        state = load_common_state_dict(str(ckpt_to_weights_subdir(Path(str(self)), is_saving=False)))
        samples = next((part["consumed_samples"] for part in state.values()
                        if isinstance(part, dict) and "consumed_samples" in part), 0)
        return replace(card, training={"steps": int(state["global_step"]), "tokens": int(samples) * config.seq_length,
                                       "lr": optimizer.lr})


@io.model_exporter(FlexOlmoModel, "hf")
class HuggingFaceExporter(_Exporter):
    """To a directory that transformers loads."""

    def apply(self, output_path: Path, drop_bias: bool = False, **options: Any) -> Path:
        """Write; ``drop_bias`` leaves out a learned router bias, for which the format has no place."""
        model, trainer, lazy = self.read()
        save_huggingface(lazy, output_path, drop_bias)
        teardown(trainer, model)
        return output_path


@io.model_exporter(FlexOlmoModel, "flexolmo")
class FlexOlmoExporter(_Exporter):
    """To a checkpoint of this package."""

    def apply(self, output_path: Path, **options: Any) -> Path:
        """Write the model; of a pair what the owner trained; of router tuning the folder of a run with its result."""
        model, trainer, lazy = self.read()
        if model.config.proxies:
            _save_tuned(model.config, lazy, Path(output_path))
        else:
            save_megatron(lazy, output_path)
        teardown(trainer, model)
        return output_path


def _save_tuned(config: FlexOlmoConfig, lazy: LazyModel, path: Path) -> None:
    source = config.plan()[1].source
    owners = source.card.expert_names[1:]
    rows = RowSet(TUNED, owners, [name for name in owners if name in config.proxies])
    digest = model_digest(source)
    card = replace(source.card, kind="router", row_sets=[rows], merged_digest=digest, training=lazy.card.training)
    names = expected_tensors(card.model, "router")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "rows")
        save_megatron(LazyModel(card, {name: lazy.tensors[name] for name in names}), checkpoint)
        write_tuned_model(source, digest, [checkpoint], path)
