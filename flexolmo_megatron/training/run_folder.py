"""The folder of a run: who may use it, and what a launch changes in it before the first step."""

import hashlib
from operator import attrgetter
from pathlib import Path

from flexolmo_megatron.config.load import load_config, save_config
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.convert.model import CHECKPOINTS
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file, read_json, write_json
from flexolmo_megatron.training.checkpoint import Found, all_step_folders, set_aside, sweep
from flexolmo_megatron.training.console import say
from flexolmo_megatron.training.datasets import index_digests
from flexolmo_megatron.training.planning import Mode
from flexolmo_megatron.training.signals import REQUEUE_FILE

DATA_FILE = "data.json"
"""What the run is made from: sha256 of each data set's index, by its prefix, and of the domain vector, by its path."""


def check_folder(run: Path, mode: Mode, config: TrainConfig) -> dict[str, str]:
    """Check that the run's folder is free, or holds a run of the same kind and data; rank 0 alone. Changes nothing.

    Returns:
        What ``DATA_FILE`` will hold, for ``claim``.

    Raises:
        FlexOlmoError: it does not; a data set is missing or broken.
    """
    mark = run / "mode"
    if run.exists() and not mark.is_file():
        # A first start that fails leaves indices of the data at most; one that is killed, perhaps a half-written mark.
        if not run.is_dir() or any(path.name != "cache" and path.name[:6] != ".mode." for path in run.iterdir()):
            what = "a folder with other things in it" if run.is_dir() else "a file"
            raise FlexOlmoError(f"out = {run} is {what}; name a new folder")
    elif mark.is_file() and mark.read_text().strip() != mode:
        raise FlexOlmoError(
            f"out = {run} holds a run of `train {mark.read_text().strip()}`, not of `train {mode}`; name a new folder"
        )
    inputs = _inputs(config)
    if all_step_folders(run) and (run / "config.yaml").is_file():
        _check_same_course(load_config(TrainConfig, paths=[str(run / "config.yaml")]), config)
        _check_same_inputs(run, inputs)
    return inputs


def claim(run: Path, mode: Mode, config: TrainConfig, inputs: dict[str, str], found: Found) -> None:
    """Mark the folder as this run's and clear away what earlier launches left; rank 0 alone.

    To be called when everything that can fail has succeeded: a start that fails changes nothing in an existing run.

    Args:
        run: the folder.
        mode, config: written into it.
        inputs: from ``check_folder``; written into it.
        found: what the run goes on from; newer checkpoints, which are damaged, are renamed.

    Raises:
        FlexOlmoError: the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        with atomic_file(run / "mode", "w") as file:
            file.write(mode + "\n")
    except OSError as error:
        raise FlexOlmoError(f"out = {run} cannot be made: {error.strerror}") from error
    save_config(config, run / "config.yaml")
    write_json(run / DATA_FILE, inputs)
    (run / REQUEUE_FILE).unlink(missing_ok=True)
    for name in sweep(run):
        say(f"removed {CHECKPOINTS}/{name}, which a killed launch has left unfinished")
    for path, problem in found.damaged.items():
        say(f"{path} is damaged and not used: {problem}; kept as damaged_{path.name}")
    set_aside(found.damaged)


def _check_same_course(before: TrainConfig, now: TrainConfig) -> None:
    """Megatron draws the order of samples anew for another number of them: a run can only go on with the same one. And
    numbers of another type would be another run's: bf16 begins from rounded weights and has master weights."""
    samples = ("train_iters", "global_batch_size", "seed")
    data = [f"data.{name}" for name in ("train", "public", "public_share", "proxies", "seq_length")]
    # The penalty on drift goes on from the last step's drift, which a run without it does not save.
    for name in (*samples, *data, "bf16", "expert.drift_coeff"):
        old, new = attrgetter(name)(before), attrgetter(name)(now)
        if old != new:
            raise FlexOlmoError(
                f"{name} = {new}: the run in {now.out} began with {old} and can only be resumed with that"
            )


def _check_same_inputs(run: Path, inputs: dict[str, str]) -> None:
    """Other documents under the same names would be another order of samples, another vector one that the package does
    not come from; both would go unnoticed."""
    path = run / DATA_FILE
    before = read_json(path, "what a run is made from") if path.is_file() else {}
    for name, digest in inputs.items() if isinstance(before, dict) else ():
        if before.get(name, digest) != digest:
            raise FlexOlmoError(
                f"{name} has changed since the run in {run} began, which can only be resumed with what it was then"
            )


def _inputs(config: TrainConfig) -> dict[str, str]:
    data = config.data
    sources = {"data.train": data.train, "data.public": data.public}
    sources |= {f"data.proxies.{name}": prefixes for name, prefixes in data.proxies.items()}
    inputs = index_digests({name: prefixes for name, prefixes in sources.items() if prefixes})
    vector = config.expert.domain_vector
    if vector is not None and Path(vector).is_file():
        with open(vector, "rb") as file:
            inputs[vector] = hashlib.file_digest(file, "sha256").hexdigest()
    return inputs
