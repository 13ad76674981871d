"""The card (``flexolmo.json``) of checkpoints that other trainers wrote: it makes them ordinary ones of this package.

Megatron-LM and Megatron-Bridge call nobody when they have saved, but they store their settings, and the card travels
among those. So cards can be written at any later time: when a run ends or starts again, or by hand.
"""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flexolmo_megatron.config.card import CARD_FILE, FORMAT_VERSION, ModelCard
from flexolmo_megatron.config.load import read_yaml
from flexolmo_megatron.convert.model import newest_checkpoint
from flexolmo_megatron.convert.torch_metadata import METADATA_FILE
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import write_json
from flexolmo_megatron.training.resume import check_same_card

_BRIDGE_SETTINGS = "run_config.yaml"


def write_cards(save: Path) -> list[Path]:
    """Write the missing cards of all complete checkpoints in a run's folder; then `flexolmo pack` and others read them.

    Args:
        save: with ``iter_0000100`` and so on, of one's own run: Megatron unpickles its settings.

    Returns:
        The checkpoints that got one.

    Raises:
        FlexOlmoError: a checkpoint is not from a run of a model of this package.
    """
    written = []
    for folder in sorted(save.glob("iter_*")):
        if (folder / METADATA_FILE).is_file() and not (folder / CARD_FILE).exists():
            read = _of_bridge if (folder / _BRIDGE_SETTINGS).is_file() else _of_megatron_lm
            card, training = read(folder)
            write_json(folder / CARD_FILE, {"format_version": FORMAT_VERSION, **json.loads(card), "training": training})
            written.append(folder)
    return written


def check_checkpoints(save: str | None, load: str | None, card: ModelCard) -> None:
    """Give earlier checkpoints the cards that they lack, and check that what a launch goes on with is of this run.

    Args:
        save, load: folders of checkpoints; None for none.
        card: of this run.

    Raises:
        FlexOlmoError: the newest checkpoint to go on with belongs to another run.
    """
    for folder in {save, load} - {None}:
        write_cards(Path(folder))
    if load and (newest := newest_checkpoint(Path(load))):
        check_same_card(newest, card)


def _of_megatron_lm(folder: Path) -> tuple[str, dict[str, Any]]:
    """The card of a model, as JSON, and the summary of its training."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    common = load_common_state_dict(str(folder))
    args = common.get("args")
    if not hasattr(args, "flexolmo_card"):
        raise FlexOlmoError(f"{folder} was not written by a launch of flexolmo_megatron.integrations.megatron_lm: "
                            "expected its arguments to have a flexolmo_card")
    return args.flexolmo_card, {
        "tokens": args.consumed_train_samples * args.seq_length,
        "steps": common["iteration"],
        "lr": args.lr,
        "seed": args.seed,
    }


def _of_bridge(folder: Path) -> tuple[str, dict[str, Any]]:
    run = read_yaml(str(folder / _BRIDGE_SETTINGS))
    card = OmegaConf.select(run, "model.flexolmo_card")
    if card is None:
        raise FlexOlmoError(f"{folder} was not written by a run of flexolmo_megatron.integrations.bridge: expected "
                            f"model.flexolmo_card in its {_BRIDGE_SETTINGS}")
    steps = int(folder.name.removeprefix("iter_"))
    return card, {
        "tokens": steps * run.train.global_batch_size * run.model.seq_length,
        "steps": steps,
        "lr": run.optimizer.lr,
        "seed": run.rng.seed,
    }
