"""Work that can fail on some ranks alone, or that one rank does for all, without a rank that waits for ever."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.runtime.setup import local_device

Result = TypeVar("Result")


def on_first_rank(function: Callable[[], Result]) -> Result:
    """Call ``function`` on rank 0 and give its result to every rank. Called by all ranks.

    Args:
        function: without communication; its result must be picklable.

    Raises:
        FlexOlmoError: on every rank the message of one, or of an OSError, that ``function`` raised.
        Exception: any other error, as it is, on rank 0; the others raise a RuntimeError with its text.
    """
    shared: list[Any] = [None, None]
    own = None
    if torch.distributed.get_rank() == 0:
        try:
            shared[0] = function()
        except Exception as error:
            own, shared[1] = error, _described(error)
    torch.distributed.broadcast_object_list(shared)
    if shared[1] is not None:
        _raise(own, 0, *shared[1])
    return shared[0]


def together(function: Callable[[], Result]) -> Result:
    """Call ``function`` on every rank; where it raises on some, raise on all. Called by all ranks.

    Args:
        function: does not communicate after the first point where only some ranks could fail.

    Raises:
        FlexOlmoError: on every rank the message of the first rank with one, or with an OSError.
        Exception: any other error, as it is, on the rank where it happened; the others raise a RuntimeError with its
            text.
    """
    result, own, shared = None, None, None
    try:
        result = function()
    except Exception as error:
        own, shared = error, _described(error)
    failed = torch.tensor([int(own is not None)], device=local_device())
    torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if not failed.item():
        return result
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, shared)
    rank, described = next((rank, outcome) for rank, outcome in enumerate(outcomes) if outcome is not None)
    _raise(own, rank, *described)


def _described(error: Exception) -> tuple[bool, str]:
    """Whether an error is the user's, and what the other ranks say of it."""
    users = isinstance(error, FlexOlmoError | OSError)
    return users, f"{error}" if users else f"{type(error).__name__}: {error}"


def _raise(own: Exception | None, rank: int, users: bool, text: str) -> NoReturn:
    """Raise this rank's own error, or that of another rank."""
    if own is not None and not isinstance(own, OSError):
        raise own
    if users:
        raise FlexOlmoError(text) from own
    raise RuntimeError(f"rank {rank}: {text}") from own
