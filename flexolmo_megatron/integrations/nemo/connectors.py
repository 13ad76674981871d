"""NeMo's importers and exporters, ``hf`` (Hugging Face) and ``flexolmo`` (checkpoints of this package).

Both importers take whatever ``flexolmo_megatron.load_model`` takes, but no pair. A pair is exported as ``flexolmo``,
which `flexolmo pack` reads; a tuned router as well, with the rows that the merged model had before.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo.lightning import MegatronStrategy, Trainer, io, teardown

from flexolmo_megatron.config.card import TUNED_MODEL
from flexolmo_megatron.convert.huggingface import save_huggingface
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.megatron_writer import save_megatron
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.names import expected_tensors
from flexolmo_megatron.convert.row_sets import write_row_sets
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.integrations.nemo.config import FlexOlmoConfig, sizes
from flexolmo_megatron.integrations.nemo.model import FlexOlmoModel, saved_state
from flexolmo_megatron.model.weights import live_model, load_weights


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
        target.card = source.card
        self.nemo_save(output_path, trainer)
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
        """NeMo's, which calls it itself before an export to Hugging Face, but without asynchronous saving."""
        strategy = MegatronStrategy(ddp="pytorch", setup_optimizers=False, ckpt_async_save=False)
        trainer = trainer or Trainer(devices=1, accelerator="cpu" if cpu else "gpu", strategy=strategy)
        return super().nemo_load(path, trainer, cpu)

    def read(self) -> tuple[FlexOlmoModel, Trainer, LazyModel]:
        """Load the NeMo checkpoint; the last value views its tensors by their canonical names.

        Raises:
            FlexOlmoError: it was not written by this package's model.
        """
        state, card = saved_state(str(self))
        model, trainer = self.nemo_load(Path(str(self)))
        if state["global_step"]:
            samples = next((part["consumed_samples"] for part in state.values()
                            if isinstance(part, dict) and "consumed_samples" in part), 0)
            card.training = {"steps": int(state["global_step"]), "tokens": int(samples) * model.config.seq_length,
                             "lr": model.optim.config.lr}
        model.card = card
        # Of router tuning the whole model is live.
        built = replace(model.config.plan()[1].built, training=card.training) if card.kind == "router" else card
        return model, trainer, live_model(model.module, built)


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
        card = model.card
        if card.kind == "router":
            rows = {name: lazy.tensors[name] for name in expected_tensors(card.model, card.kind)}
            tuned = replace(card.row_sets[0], training=card.training)
            write_row_sets(model.config.plan()[1].source, card.merged_digest, [tuned], [rows],
                           Path(output_path, TUNED_MODEL))
        else:
            save_megatron(lazy, output_path)
        teardown(trainer, model)
        return output_path
