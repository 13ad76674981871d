"""NeMo's data module over what ``flexolmo train`` reads."""

from typing import Any

from lightning.pytorch import LightningDataModule
from nemo.collections import llm
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from flexolmo_megatron.config.train import DataConfig, TrainConfig
from flexolmo_megatron.training.run import run_datasets


class FlexOlmoData(llm.PreTrainingDataModule):
    """Data sets of `flexolmo data`, with the samples and the order of ``flexolmo train``.

    Args:
        paths: prefixes, as ``data.train`` of ``flexolmo train``; valid, public, public_share and proxies likewise.
        seq_length: tokens per sample.
        micro_batch_size, global_batch_size: samples.
        cache: folder of the sample indices, shared by all processes.
        seed: of the order.
        num_workers: processes per rank that read ahead.
    """

    def __init__(self, paths: list[Any], valid: list[Any] | None = None, public: list[Any] | None = None,
                 public_share: float = 0.0, proxies: dict[str, list[Any]] | None = None, seq_length: int = 4096,
                 micro_batch_size: int = 1, global_batch_size: int = 1024, cache: str = "cache", seed: int = 1234,
                 num_workers: int = 2) -> None:
        LightningDataModule.__init__(self)  # that of PreTrainingDataModule makes a tokenizer, from the network
        self.data = DataConfig(paths, valid or [], public or [], public_share, proxies or {}, seq_length, cache)
        self.seq_length, self.micro_batch_size, self.global_batch_size = seq_length, micro_batch_size, global_batch_size
        self.seed, self.num_workers, self.pin_memory, self.persistent_workers = seed, num_workers, True, num_workers > 0
        self.tokenizer, self.init_global_step = None, 0
        self.data_sampler = MegatronDataSampler(seq_length, micro_batch_size, global_batch_size)

    def setup(self, stage: str = "") -> None:
        """Build the samples; called by all ranks, by Lightning."""
        trainer = self.trainer
        config = TrainConfig(out=".", data=self.data, train_iters=trainer.max_steps, seed=self.seed,
                             global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size,
                             eval_iters=max(1, int(trainer.limit_val_batches)))
        self._train_ds, self._validation_ds, _ = run_datasets(config, trainer.lightning_module.config.card())

    def val_dataloader(self) -> Any:
        return [] if self._validation_ds is None else super().val_dataloader()
