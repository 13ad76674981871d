"""datatrove's local executor, with the processes of document_pool.py.

datatrove's own waits forever for a process that was killed, and prints what happens in each of them.
"""

import os
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils import logging

from flexolmo_megatron.training.document_pool import work


def keep_off_the_terminal() -> None:
    """Let datatrove in this process log to files alone: it adds a log on standard error for each task anew."""
    if isinstance(logging.sys, SimpleNamespace):
        return
    logging.sys = SimpleNamespace(stderr=open(os.devnull, "w"))  # noqa: SIM115
    logging.setup_default_logger()


class LocalExecutor(LocalPipelineExecutor):
    """Runs the shards that are not done in ``workers`` processes; 1 is this process."""

    def run(self) -> None:
        """Run them.

        Raises:
            FlexOlmoError: a process was killed; and whatever a step raises.
        """
        for _ in work(self.get_incomplete_ranks(), _runner, self, self.workers):
            pass


def _runner(executor: LocalExecutor) -> Callable[[int], Any]:
    keep_off_the_terminal()
    pipeline = executor.pipeline

    def run(rank: int) -> None:
        executor.pipeline = deepcopy(pipeline)  # its steps count what they do
        executor._run_for_rank(rank)

    return run
