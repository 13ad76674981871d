"""The card (``flexolmo.json``) of checkpoints that Megatron-LM wrote, which makes them ordinary ones of this package.

Megatron-LM calls nobody when it has saved, but it stores its arguments, and the card travels among those. So cards can
be written at any later time: when a run ends or starts again, or by hand.
"""

import json
from pathlib import Path

from flexolmo_megatron.config.card import CARD_FILE, FORMAT_VERSION
from flexolmo_megatron.convert.megatron import METADATA_FILE
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import write_json


def write_cards(save: Path) -> list[Path]:
    """Write the missing cards of all complete checkpoints in a ``--save`` folder.

    Args:
        save: of a launch of ours; it must be trusted, like every Megatron checkpoint.

    Returns:
        The checkpoints that got one.
    """
    written = []
    for folder in sorted(save.glob("iter_*")):
        if (folder / METADATA_FILE).is_file() and not (folder / CARD_FILE).exists():
            write_json(folder / CARD_FILE, _card(folder))
            written.append(folder)
    return written


def _card(folder: Path) -> dict:
    from megatron.core.dist_checkpointing import load_common_state_dict

    common = load_common_state_dict(str(folder))
    args = common.get("args")
    if not hasattr(args, "flexolmo_card"):
        raise FlexOlmoError(f"{folder} was not written by a launch of flexolmo_megatron.integrations.megatron_lm: "
                            "expected its arguments to have a flexolmo_card")
    training = {
        "tokens": args.consumed_train_samples * args.seq_length,
        "steps": common["iteration"],
        "lr": args.lr,
        "seed": args.seed,
    }
    return {"format_version": FORMAT_VERSION, **json.loads(args.flexolmo_card), "training": training}
