"""What one rank alone meets, all ranks raise: none is left waiting."""

from datetime import timedelta
from typing import Any

from tests.distributed import run_distributed


def _outcome(function: Any, *args: Any) -> str:
    try:
        return f"returned {function(*args)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _failures() -> list[str]:
    from flexolmo_megatron.errors import FlexOlmoError
    from flexolmo_megatron.runtime.setup import initialize

    initialize(timeout_minutes=7)
    import torch
    from megatron.core import parallel_state

    waits = [
        group._get_backend(torch.device("cpu")).options._timeout
        for group in (torch.distributed.group.WORLD, parallel_state.get_data_parallel_group())
    ]
    assert waits == [timedelta(minutes=7)] * 2

    from flexolmo_megatron.runtime.ranks import on_first_rank, together

    rank = torch.distributed.get_rank()

    def fail(error: Exception, on: int = 0) -> str:
        if rank == on:
            raise error
        return "done"

    return [
        _outcome(on_first_rank, lambda: fail(FlexOlmoError("bad input"))),
        _outcome(on_first_rank, lambda: fail(OSError(28, "No space left"))),
        _outcome(on_first_rank, lambda: fail(KeyError("row"))),
        _outcome(on_first_rank, lambda: "made"),
        _outcome(together, lambda: fail(FlexOlmoError("bad input"), 1)),
        _outcome(together, lambda: fail(OSError(28, "No space left"), 1)),
        _outcome(together, lambda: fail(RuntimeError("out of memory"), 1)),
        _outcome(together, lambda: rank),
    ]


def test_all_ranks_raise_what_one_meets():
    both = ["FlexOlmoError: bad input", "FlexOlmoError: [Errno 28] No space left"]
    assert run_distributed(_failures, 2) == [
        [*both, "KeyError: 'row'", "returned made", *both, "RuntimeError: rank 1: RuntimeError: out of memory",
         "returned 0"],
        [*both, "RuntimeError: rank 0: KeyError: 'row'", "returned made", *both, "RuntimeError: out of memory",
         "returned 1"],
    ]
