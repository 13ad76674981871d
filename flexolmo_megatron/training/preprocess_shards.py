"""Tokenizing in shards, a file each, by datatrove: data sets of the files, which are joined in their order.

The folder ``OUT.state`` holds those that are done, so that the same command goes on after a stop.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_megatron.files import read_json
from flexolmo_megatron.shards import require_datatrove
from flexolmo_megatron.shards.run import Where, kept_if_begun, open_state, progress_folder, run_shards
from flexolmo_megatron.training.documents import BadDocuments

if TYPE_CHECKING:
    from flexolmo_megatron.training.preprocess import Output


def tokenize_in_shards(files: Sequence[Path], out: Path, outputs: "Sequence[Output]", bad: BadDocuments, *,
                       tokenizer: dict[str, str], text_key: str, where: Where, valid_share: float, seed: int) -> Path:
    """Add the documents of ``files`` to ``outputs`` and the counts of the unusable ones to ``bad``; see preprocess.py.

    Returns:
        The folder with the data sets of the files, which are needed until the ``outputs`` are there.

    Raises:
        FlexOlmoError: bad input, or too many unusable documents.
    """
    require_datatrove("flexolmo data --slurm")
    from flexolmo_megatron.shards.documents import ReadDocuments
    from flexolmo_megatron.training.preprocess_steps import BAD, Tokenize

    state = open_state(out, {"tokenizer": tokenizer, "text_key": text_key, "valid_share": valid_share, "seed": seed},
                       {"files": files})
    reader = ReadDocuments(files, 1, text_key, bad.limit, progress_folder(state))
    step = Tokenize(state, reader, tokenizer, len(outputs), valid_share, seed)
    with kept_if_begun(state):
        run_shards([reader, step], len(files), state, where, "tokenizing")
    for shard in range(len(files)):
        bad.counts.update(read_json(step.folder(shard) / BAD, "counts of unusable documents"))
    bad.check()
    for number, output in enumerate(outputs):
        for shard in range(len(files)):
            output.append(step.folder(shard) / str(number))
    return state
