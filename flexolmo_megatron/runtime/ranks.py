"""Work that one rank does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from flexolmo_megatron.errors import FlexOlmoError

Result = TypeVar("Result")


def on_first_rank(function: Callable[[], Result]) -> Result:
    """Call ``function`` on rank 0 and give its result to every rank. Called by all ranks.

    Args:
        function: without communication; its result must be picklable.

    Raises:
        FlexOlmoError: on every rank alike, what ``function`` raised on rank 0 as such or as an OSError. So no rank
            waits for one that has given up.
    """
    shared: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            shared[0] = function()
        except (FlexOlmoError, OSError) as error:
            shared[1] = str(error)
    torch.distributed.broadcast_object_list(shared)
    if shared[1] is not None:
        raise FlexOlmoError(shared[1])
    return shared[0]
