"""Writing one Megatron checkpoint, at once or by a thread while training goes on.

The planning and the format are Megatron-core's (``dist_checkpointing``, torch_dist, 0.16.1). Its writing is not used:
what rank 0 does alone there (``common.pt``, ``.metadata``, ``metadata.json``) leaves the other ranks waiting where it
fails on a full disk; it forks processes that a kill of the rank leaves behind, and that on the CPU inherit OpenMP's and
gloo's threads in an unusable state. Here threads of this process write, and every failure of one rank is shared. What
data-parallel processes hold alike is shared out among them, as Megatron-LM's ``--ckpt-fully-parallel-save`` does it.
"""

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_directory, fsync_path
from flexolmo_megatron.runtime.ranks import on_first_rank, together
from flexolmo_megatron.training.integrity import Files, describe_file, write_record

THREADS = 2
"""Files per rank, written side by side; upstream's number."""


class _RankFiles(FileSystemWriterAsync):
    """What one rank writes: upstream's plan of it, with the values taken at the time of the plan."""

    def __init__(self, folder: str, copied: bool) -> None:
        super().__init__(folder, thread_count=THREADS)
        self._copied = copied
        self._values: dict[Any, Tensor | io.BytesIO] = {}
        self._plan: SavePlan | None = None
        self._planner: SavePlanner | None = None

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Called by upstream at the end of planning; what can fail on one rank alone is left to ``take_values``."""
        self._plan, self._planner = plan, planner

    def take_values(self) -> None:
        """Take what will be written, as it is now.

        Raises:
            RuntimeError: no memory for a copy.
        """
        planner, self._planner = self._planner, None
        for item in self._plan.items:
            value = planner.resolve_data(item)
            if self._copied and isinstance(value, Tensor):
                value = value.detach().to("cpu", copy=True, non_blocking=True)
            self._values[item.index] = value
        if torch.cuda.is_available():  # the threads that write know nothing of this one's streams
            torch.cuda.synchronize()

    def write(self, hashed: bool) -> tuple[list[WriteResult], Files]:
        """Write this rank's files.

        Returns:
            Where each value lies, and the record of each file.

        Raises:
            OSError: full disk.
        """
        buckets = [bucket for bucket in _split_by_size_and_type(THREADS, self._plan.items) if bucket]
        names = [f"{self._plan.storage_data.prefix}{place}{DEFAULT_SUFFIX}" for place in range(len(buckets))]
        with ThreadPoolExecutor(THREADS) as pool:
            results = list(pool.map(self._write_file, names, buckets))
            records = list(pool.map(lambda name: describe_file(Path(self.checkpoint_dir, name), hashed), names))
        self._values.clear()
        return [result for file in results for result in file], dict(zip(names, records, strict=True))

    def _write_file(self, name: str, items: list[WriteItem]) -> list[WriteResult]:
        path = Path(self.checkpoint_dir, name)
        results = []
        with open(path, "wb") as stream:
            for item in items:
                value = self._values[item.index]
                if item.type != WriteItemType.BYTE_IO:
                    value = value.detach().cpu()
                    if value.untyped_storage().size() != value.numel() * value.itemsize:
                        value = value.clone()  # torch.save would write the whole buffer that this is a view of
                results.append(_write_item(self.transforms, stream, value, item, name, SerializationFormat.TORCH_SAVE))
        fsync_path(path)
        return results


class CheckpointWriter:
    """A checkpoint on its way to ``path``; made, and finished or abandoned, by all ranks together."""

    def __init__(self, path: Path, content: dict[str, Any], card: ModelCard, *, background: bool, hashed: bool) -> None:
        """Plan the checkpoint and write it, or begin to.

        Args:
            path: the folder; it appears, whole, when ``finish`` is called.
            content: nested dictionary of ShardedTensors and plain values, as for ``dist_checkpointing.save``.
            card: saved with it.
            background: write from a copy of this rank's tensors in host memory, in a thread.
            hashed: record the sha256 of tensor files.

        Raises:
            FlexOlmoError: it cannot be written; nothing of it is left, and nothing else is changed.
        """
        self.path, self._card, self._hashed = path, card, hashed
        self._written: tuple[list[WriteResult], Files] | None = None
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._folder = ExitStack()  # of rank 0 alone
        with self._explained():
            folder = Path(on_first_rank(self._make_folder))
            sharded, common = together(lambda: save_preprocess(content, validate_access_integrity=False))
            _share_out(sharded, common)
            on_first_rank(lambda: _write_common(folder, common))
            self._files = _RankFiles(str(folder), copied=background)
            (_, self._metadata, _), *_ = save_state_dict_async_plan(
                together(lambda: _as_torch_has_it(sharded)),
                self._files,
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )
            together(self._files.take_values)
        if background:
            self._thread = threading.Thread(target=self._write, name="checkpoint")
            self._thread.start()
        else:
            self._write()

    @property
    def writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait for all ranks' files and give the folder its name. Called by all ranks.

        Raises:
            FlexOlmoError: it cannot be written; nothing of it is left, and nothing else is changed.
        """
        with self._explained():
            if self._thread is not None:
                self._thread.join()
            together(self._raise_error)
            first = torch.distributed.get_rank() == 0
            written: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
            torch.distributed.gather_object(self._written, written)
            on_first_rank(lambda: self._complete(written))

    def abandon(self) -> None:
        """Stop without a checkpoint, on this rank alone: end the thread and remove what has been written."""
        if self._thread is not None:
            self._thread.join()
        self._folder.__exit__(FlexOlmoError, FlexOlmoError("abandoned"), None)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Where the block fails, remove what has been written and give users their sentence."""
        try:
            yield
        except BaseException as error:
            self.abandon()
            if not isinstance(error, FlexOlmoError | OSError):
                raise
            raise FlexOlmoError(
                f"cannot write the checkpoint {self.path}: {error}; earlier checkpoints are intact"
            ) from error

    def _make_folder(self) -> str:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return str(self._folder.enter_context(atomic_directory(self.path)))

    def _write(self) -> None:
        try:
            self._written = self._files.write(self._hashed)
        except Exception as error:
            self._error = error

    def _raise_error(self) -> None:
        if isinstance(self._error, RuntimeError):  # torch's way to say that a stream has failed
            raise FlexOlmoError(" ".join(str(self._error.__context__ or self._error).split())[:300]) from self._error
        if self._error is not None:
            raise self._error

    def _complete(self, written: list[tuple[list[WriteResult], Files]]) -> None:
        """Rank 0's part: everything that names what the others have written."""
        folder = Path(self._files.checkpoint_dir)
        self._files.finish(self._metadata, [results for results, _ in written])
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        self._card.save(folder)
        write_record(folder, {name: record for _, files in written for name, record in files.items()})
        self._folder.close()


def _share_out(sharded: dict[str, Any], common: dict[str, Any]) -> None:
    """Decide which of the ranks that hold a tensor alike writes it, by size; checks that each is written once."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    writers = determine_main_replica_uniform_distribution(sharded, group)
    distribute_main_replicas_with_precomputed_distribution(sharded, group, writers)
    _, of_all_ranks = determine_global_metadata(sharded)
    together(lambda: validate_sharding_integrity(of_all_ranks, common_state_dict=common))


def _as_torch_has_it(sharded: dict[str, Any]) -> dict[str, Any]:
    state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    return mcore_to_pyt_state_dict(state, False)


def _write_common(folder: Path, common: dict[str, Any]) -> None:
    """The values that are not sharded, as upstream's ``TorchCommonSaveStrategy`` writes them."""
    content = io.BytesIO()
    torch.save(common, content)
    (folder / COMMON_STATE_FNAME).write_bytes(content.getbuffer())
