"""Tokenized data sets as batches: Megatron's ``GPTDataset`` and blends of it, and a sampler that resumes exactly.

A sample is ``sequence_length + 1`` consecutive tokens of a shuffled stream of documents; attention runs across
document ends and the loss counts every token, the end-of-document token included, as OLMo trains.
"""

import contextlib
import functools
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import make_temporary_folder
from flexolmo_megatron.runtime.ranks import on_first_rank
from flexolmo_megatron.training.dataset_info import DatasetInfo
from flexolmo_megatron.training.tokenizer import Tokenizer

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_DTYPES = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
_SCAN_TOKENS = 1 << 24
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class Datasets(NamedTuple):
    """Samples per split; None where no data was given for it."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None


class _Stored(NamedTuple):
    """What the files of a data set say about it."""

    tokens: int
    dtype: np.dtype
    index_digest: str
    """sha256 of the .idx: changes when any document's length does."""


def parse_blend(blend: str | Sequence[str | float], what: str = "data") -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of ``PREFIX``, ``[PREFIX, ...]`` or ``[WEIGHT, PREFIX, WEIGHT, PREFIX, ...]``.

    Returns:
        The prefixes and, where given, as many weights.

    Raises:
        FlexOlmoError: nothing given, a weight that is not positive, or weights for only some.
    """
    if isinstance(blend, str):
        return [blend], None
    items = list(blend)
    numbers = [_number(item) for item in items]
    if not items:
        raise FlexOlmoError(f"{what} is empty: expected the prefix of a data set, or several")
    if all(number is None for number in numbers):
        return [str(item) for item in items], None
    weights, prefixes = numbers[::2], items[1::2]
    if len(items) % 2 or None in weights or any(number is not None for number in numbers[1::2]):
        raise FlexOlmoError(f"{what} = {items}: expected prefixes alone, or a weight before every prefix, as in "
                            "[0.7, a, 0.3, b]")
    for weight, prefix in zip(weights, prefixes, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise FlexOlmoError(f"{what}: weight {weight} of {prefix}: expected a number above 0")
    return [str(prefix) for prefix in prefixes], weights


def _number(item: str | float) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def _read_index(prefix: str, what: str) -> _Stored:
    """Check that ``prefix`` names a complete data set and describe it."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise FlexOlmoError(f"{what}: {path} does not exist; expected a data set that flexolmo data wrote, "
                                "named without its suffix")
    status = index.stat()
    try:
        stored = _parse_index(index, status.st_size, status.st_mtime_ns)
    except (struct.error, ValueError) as error:
        raise FlexOlmoError(f"{what}: {index} is not the index of a Megatron data set, or is truncated") from error
    tokens, dtype = stored.tokens, stored.dtype
    if tokens == 0:
        raise FlexOlmoError(f"{what}: {prefix} holds no tokens")
    if data.stat().st_size != tokens * dtype.itemsize:
        raise FlexOlmoError(f"{what}: {data} has {data.stat().st_size:,} bytes; expected {tokens * dtype.itemsize:,} "
                            f"({tokens:,} tokens of {dtype}) by its index")
    return stored


@functools.lru_cache
def _parse_index(index: Path, size: int, modified_ns: int) -> _Stored:
    """Read an index of that size and time, which may have gigabytes, once in a process.

    Raises:
        struct.error, ValueError: it is none.
    """
    with open(index, "rb") as file:
        magic, version, code, sequences, documents = _INDEX_HEADER.unpack(file.read(_INDEX_HEADER.size))
        if (magic != _INDEX_MAGIC or version != 1 or code not in _TOKEN_DTYPES
                or size != _INDEX_HEADER.size + 12 * sequences + 8 * documents):
            raise ValueError
        lengths = np.fromfile(file, np.int32, sequences)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _Stored(int(lengths.sum(dtype=np.int64)), _TOKEN_DTYPES[code], digest)


def index_digests(blends: dict[str, str | Sequence[str | float]]) -> dict[str, str]:
    """The digest of each data set's index, by its prefix: changes when any document's length does.

    Args:
        blends: by the options that name them, as ``parse_blend`` takes them.

    Raises:
        FlexOlmoError: a data set is missing or broken.
    """
    return {prefix: _read_index(prefix, what).index_digest
            for what, blend in blends.items() for prefix in parse_blend(blend, what)[0]}


def _check_vocabulary(prefix: str, stored: _Stored, tokenizer: Tokenizer, vocab_size: int) -> None:
    info = DatasetInfo.load(prefix)
    if info and info.tokens == stored.tokens:
        if (info.vocab_size, info.end_of_document) != (tokenizer.vocab_size, tokenizer.eod):
            raise FlexOlmoError(f"{prefix} was tokenized with {info.tokenizer} ({info.vocab_size} ids, end of document "
                                f"{info.end_of_document}); expected the model's tokenizer, {tokenizer.spec} "
                                f"({tokenizer.vocab_size} ids, end of document {tokenizer.eod})")
        largest = info.largest_token
    else:  # another program wrote it
        ids = np.memmap(f"{prefix}.bin", stored.dtype, "r")
        largest = max(int(ids[start:start + _SCAN_TOKENS].max()) for start in range(0, len(ids), _SCAN_TOKENS))
    if largest >= vocab_size:
        raise FlexOlmoError(f"{prefix}.bin holds token id {largest}; expected ids below the model's vocabulary size, "
                            f"{vocab_size}: was it made with another tokenizer?")


def build_datasets(*, train: str | Sequence[str | float] | None, valid: str | Sequence[str | float] | None = None,
                   test: str | Sequence[str | float] | None = None, train_samples: int | None = None,
                   valid_samples: int | None = None, test_samples: int | None = None, sequence_length: int,
                   seed: int, tokenizer: Tokenizer, vocab_size: int, cache_dir: str | Path) -> Datasets:
    """Build the splits; to be called on every rank, with torch.distributed initialised.

    Args:
        train, valid, test: data of each split, as ``parse_blend`` takes it; None for a split that is not needed.
            Several prefixes without weights are drawn from in proportion to their tokens.
        train_samples, valid_samples, test_samples: how many samples the split gives (a blend may give a few more),
            going through the documents as often as it takes; None for all samples of one pass.
        sequence_length: tokens in a sample.
        seed: of the order of documents and samples.
        tokenizer: what the data was made with.
        vocab_size: ids that the model knows.
        cache_dir: folder for the indices that Megatron builds, shared by all ranks.

    Returns:
        The splits. The order of their samples depends on all of the arguments above except ``vocab_size`` and
        ``cache_dir``, also on the numbers of samples: a run can only be resumed exactly with the same ones.

    Raises:
        FlexOlmoError: a data set is missing, broken, too small, of another tokenizer or outside of the vocabulary.
            Raised on every rank; but where the indices cannot be written, on the one that writes them, and the others
            wait in Megatron's barrier until the launcher ends them.
    """
    blends = {name: parse_blend(given, f"data.{name}") if given is not None else None
              for name, given in (("train", train), ("valid", valid), ("test", test))}
    samples = {"train": train_samples, "valid": valid_samples, "test": test_samples}

    weighted, building, cache = on_first_rank(
        lambda: _prepare(blends, samples, sequence_length, seed, tokenizer, vocab_size, Path(cache_dir))
    )
    datasets = _build(weighted, samples, sequence_length, seed, tokenizer, building)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0 and building != cache:
        with contextlib.suppress(OSError):  # another run that shares the folder was faster; its indices are the same
            building.rename(cache)  # open memory maps stay valid
    return datasets


def _prepare(blends: dict[str, Any], samples: dict[str, int | None], sequence_length: int, seed: int,
             tokenizer: Tokenizer, vocab_size: int, cache_dir: Path) -> tuple[list[Any], Path, Path]:
    """Check the data and find the weights of every split and the folder for its indices; for rank 0 alone.

    Returns:
        Blends as Megatron takes them, the folder to build in or load from, and the folder's final name. Megatron's
        own cache key leaves out what the data set holds, and it takes truncated files of a killed run for whole ones.
        So the folder is named after everything that the indices depend on and gets that name when it is complete.
    """
    weighted: list[Any] = []
    key: list[Any] = [seed, sequence_length, tokenizer.spec]
    for name, blend in blends.items():
        if blend is None:
            weighted.append(None)
            continue
        prefixes, weights = blend
        stored = [_read_index(prefix, f"data.{name}") for prefix in prefixes]
        for prefix, item in zip(prefixes, stored, strict=True):
            _check_vocabulary(prefix, item, tokenizer, vocab_size)
            if samples[name] is None and item.tokens <= sequence_length:
                raise FlexOlmoError(f"data.{name}: {prefix} holds {item.tokens} tokens, which is less than one sample "
                                    f"of {sequence_length} + 1")
        if samples[name] is None and weights:
            raise FlexOlmoError(f"data.{name} has weights, so one pass through it has no meaning: expected a number "
                                "of samples, or prefixes without weights")
        if samples[name] is not None and weights is None:
            weights = [float(item.tokens) for item in stored]  # Megatron would not go beyond one pass without weights
        weighted.append((prefixes, weights))
        key.append([name, samples[name], prefixes, weights, [item.index_digest for item in stored]])
    cache = cache_dir / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if cache.is_dir():
        return weighted, cache, cache
    try:
        return weighted, make_temporary_folder(cache), cache
    except OSError as error:
        raise FlexOlmoError(f"cannot write the indices of the data to {cache_dir}: {error.strerror}") from error


def _build(weighted: list[Any], samples: dict[str, int | None], sequence_length: int, seed: int, tokenizer: Tokenizer,
           cache: Path) -> Datasets:
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        # The wheels for Linux hold it; an installation from source compiles it. Megatron's own compile_helpers()
        # needs a Makefile that no installed package has.
        raise FlexOlmoError("megatron-core's compiled helpers for data sets are missing; install it again with: "
                            "pip install --force-reinstall --no-deps 'megatron-core>=0.16.1,<0.17' "
                            "(needs a C++ compiler where there is no wheel)") from None
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=sequence_length, blend_per_split=weighted, tokenizer=tokenizer,
        path_to_cache=str(cache), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False)
    sizes = [samples[name] if blend else 0 for name, blend in zip(samples, weighted, strict=True)]
    try:
        return Datasets(*BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build())
    except Exception as error:
        if isinstance(error.__cause__, OSError):  # upstream wraps it, for want of space or permission
            raise FlexOlmoError(f"cannot write the indices of the data to {cache}: {error.__cause__}") from error
        raise


class ResumableSampler:
    """Indices of the batches of one data-parallel rank, from any point of a run on.

    Sample ``consumed + i`` of the data set goes to rank ``i // micro_batch_size % data_parallel_size``. So the samples
    between two points of a run depend neither on the number of ranks nor on where the run was stopped in between.
    """

    def __init__(self, total_samples: int, consumed_samples: int, micro_batch_size: int, data_parallel_rank: int,
                 data_parallel_size: int) -> None:
        """All sizes in samples; ``consumed_samples`` counts those of all ranks, in this run and those it continues."""
        step = micro_batch_size * data_parallel_size
        offset = data_parallel_rank * micro_batch_size
        self._starts = range(consumed_samples + offset, total_samples - step + 1 + offset, step)
        self._size = micro_batch_size

    def __iter__(self) -> Iterator[range]:
        return (range(start, start + self._size) for start in self._starts)

    def __len__(self) -> int:
        return len(self._starts)


def _collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor | None]:
    batch: dict[str, Tensor | None] = {key: torch.stack([sample[key] for sample in samples]) for key in _BATCH_KEYS}
    if "dataset_id" in samples[0]:
        batch["dataset_id"] = torch.tensor([sample["dataset_id"] for sample in samples])
    return {**batch, "attention_mask": None}


def batches(dataset: Dataset, *, consumed_samples: int = 0, micro_batch_size: int, data_parallel_rank: int = 0,
            data_parallel_size: int = 1, num_workers: int = 0) -> DataLoader:
    """Micro batches of one rank, in the order of the data set, without those that a run has consumed already.

    Args:
        dataset: a split of ``build_datasets``.
        consumed_samples: samples that all ranks together have had; they are left out.
        micro_batch_size: samples per batch and rank (b).
        data_parallel_rank, data_parallel_size: this rank's place among those that share the data.
        num_workers: processes that read ahead; 0 reads in this one.

    Returns:
        An iterable of ``tokens``, ``labels``, ``position_ids`` [b, s] int64, ``loss_mask`` [b, s] fp32,
        ``attention_mask`` None (causal) and, of a blend, ``dataset_id`` [b], the place of each sample's prefix in it.
        It ends before the first batch that some rank could not fill.
    """
    sampler = ResumableSampler(len(dataset), consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
    # An own generator: a DataLoader draws a seed even where nothing is random, which would move the run's random state.
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=_collate,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator())
