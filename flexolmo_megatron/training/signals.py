"""Being asked to stop: SIGTERM, and SIGUSR1 as Slurm sends it ahead of a time limit or a preemption.

A run that is asked to stop finishes its step, saves a checkpoint and ends with status 75 (EX_TEMPFAIL of sysexits.h:
try again later), which a job script turns into a requeue. torchrun hands no status on; it ends with 1 whatever its
processes ended with. So the run's folder says it too: the file ``requeue`` is there from such an end until the next
launch goes on with the run.

Importing this module loads neither torch nor Megatron.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

from flexolmo_megatron.errors import StopRequested

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE_FILE = "requeue"


class StopSignals:
    """Within the block a stopping signal is noted, instead of ending the process."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the last signal; 0 for none."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


def stay_stopped(run: Path) -> None:
    """End a process that torchrun (``--max-restarts``) has started again although its run was asked to stop.

    Raises:
        StopRequested: the run's folder is marked so, and this is such a restart; a new launch goes on with the run.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if restarted and (run / REQUEUE_FILE).is_file():
        raise StopRequested(f"{run} was asked to stop; its next launch goes on with it")


def forget_stop(run: Path) -> None:
    """Remove the mark of an earlier launch that was asked to stop; rank 0 alone. To be called after ``stay_stopped``,
    before anything can fail: a job script must not take a launch that fails for one that was asked to stop."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # no such folder, or one that the run will not be able to use either
            (run / REQUEUE_FILE).unlink()
