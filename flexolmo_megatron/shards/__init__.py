"""Work on the documents of many files in shards, run by datatrove: on this machine, or on Slurm when asked for."""

import importlib.util

from flexolmo_megatron.errors import FlexOlmoError


def require_datatrove(what: str) -> None:
    """Refuse to go on without datatrove.

    Raises:
        FlexOlmoError: it is not installed.
    """
    if importlib.util.find_spec("datatrove") is None:
        raise FlexOlmoError(f"{what} needs datatrove; install it with: pip install 'flexolmo-megatron[datatrove]'")
