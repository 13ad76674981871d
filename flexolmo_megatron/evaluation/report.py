"""The folder that an evaluation leaves: the table in three formats, and pictures."""

import os
from pathlib import Path

from flexolmo_megatron.evaluation.plots import plot_bits_per_byte, plot_routing_share
from flexolmo_megatron.evaluation.results import Results
from flexolmo_megatron.files import atomic_directory


def write_report(results: Results, directory: str | os.PathLike) -> list[Path]:
    """Write results.json, results.csv, results.md, bits_per_byte.png and, where recorded, routing_share.png.

    Args:
        results: what to write.
        directory: created whole or not at all.

    Returns:
        The files.

    Raises:
        FlexOlmoError: the directory is taken or cannot be written.
    """
    with atomic_directory(directory) as temporary:
        results.save(temporary)
        plot_bits_per_byte(results.bits_per_byte(), temporary / "bits_per_byte.png", results.reference)
        choices = {model: row for model, row in results.routing.items() if len(next(iter(row.values())).experts) > 1}
        if choices:
            plot_routing_share(choices, temporary / "routing_share.png")
    return sorted(Path(directory).iterdir())
