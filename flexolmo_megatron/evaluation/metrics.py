"""Reading ``metrics.jsonl``, which a training run writes: one JSON object per line, for a step each."""

import json
import os
from pathlib import Path
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError

METRICS_FILE = "metrics.jsonl"


def read_metrics(run: str | os.PathLike) -> dict[int, dict[str, Any]]:
    """The metrics of a run by step, in the order of the steps.

    Where a resumed run repeated a step, its later value of each metric counts. A last line that a killed run left
    unfinished is ignored.

    Args:
        run: folder of a run, or its metrics.jsonl.

    Raises:
        FlexOlmoError: there is no such file, a line is no JSON object with a step, or there is no line.
    """
    path = Path(run)
    if path.is_dir():
        path = path / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise FlexOlmoError(f"{path} does not exist; expected the folder of a training run, or its "
                            f"{METRICS_FILE}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FlexOlmoError(f"{path} cannot be read as metrics of a training run: {error}") from error
    unfinished = len(lines)  # after the last line break: empty in a complete file
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            steps.setdefault(int(record["step"]), {}).update(record)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number == unfinished:
                break
            raise FlexOlmoError(f"{path}:{number} is not a JSON object with a 'step', as a training run writes: "
                                f"{error}") from error
    if not steps:
        raise FlexOlmoError(f"{path} has no finished step yet: expected at least one line")
    return dict(sorted(steps.items()))
