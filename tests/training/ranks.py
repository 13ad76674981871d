"""Launches of several ranks for tests that kill, stop and starve them: forked from one process that has imported
everything, so that a start takes a fraction of a second.

Run as a script it is that process: it forks ranks as told on its standard input and never starts a thread itself.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.distributed import free_ports

ROOT = Path(__file__).parents[2]


class Launcher:
    """Starts ranks of ``flexolmo …``; one launch at a time."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self._launches = 0
        self.pids: list[int] = []

    def start(self, arguments: list[str], ranks: int = 2, fault: str = "", file_limit: int = 0) -> None:
        """Fork the ranks.

        Args:
            arguments: of ``flexolmo``.
            ranks: how many.
            fault: name of a function of this file that each of them calls first.
            file_limit: bytes a file may have from then on; 0 for any.
        """
        self._launches += 1
        (port,) = free_ports(1)
        self.pids = self._ask(
            arguments=arguments,
            ranks=ranks,
            fault=fault,
            file_limit=file_limit,
            port=port,
            log=str(self._logs / f"launch{self._launches}"),
        )

    def poll(self) -> list[int | None]:
        """Exit status of each rank, as of a subprocess; None while it runs."""
        return self._ask()

    def wait(self, timeout: float = 120) -> list[int]:
        """Wait for all ranks, which must end of themselves."""
        deadline = time.monotonic() + timeout
        while None in (statuses := self.poll()):
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"ranks still run after {timeout} s: {statuses}\n{self.output()}")
            time.sleep(0.02)
        return statuses

    def kill(self) -> list[int]:
        """End all ranks, as a launcher does once one has failed."""
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return self.wait()

    def output(self, rank: int = 0) -> str:
        return Path(f"{self._logs}/launch{self._launches}.{rank}").read_text(errors="replace")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)  # a busy machine

    def _ask(self, **request: Any) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def nan_gradient() -> None:
    """On rank 1, steps 2 and 3: a NaN among the gradients."""
    import torch

    from flexolmo_megatron.training import run

    finalize = run._finalize_gradients

    def poisoned(state: Any, chunks: list[Any], *args: Any, **options: Any) -> None:
        if torch.distributed.get_rank() == 1 and state.step in (1, 2):
            chunks[0].buffers[0].grad_data[3] = float("nan")
        finalize(state, chunks, *args, **options)

    run._finalize_gradients = poisoned


def nan_loss() -> None:
    """On rank 1, from step 3 on: a loss that is NaN."""
    import torch

    from flexolmo_megatron.training import passes

    loss, calls = passes._loss, [0]

    def poisoned(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
        calls[0] += 1
        return loss(loss_mask, losses * float("nan") if torch.distributed.get_rank() and calls[0] > 2 else losses)

    passes._loss = poisoned


def fails_on_rank_1() -> None:
    """Rank 1 alone cannot start."""
    from flexolmo_megatron.errors import FlexOlmoError
    from flexolmo_megatron.training import run

    def start(*args: Any, **options: Any) -> Any:
        begun = begin(*args, **options)
        if os.environ["RANK"] == "1":
            raise FlexOlmoError("a tensor cannot be read on this node")
        return begun

    begin, run.start = run.start, start


def no_room_on_rank_1() -> None:
    """Rank 1 alone has no memory for its part of the model."""
    from flexolmo_megatron.training import start

    build = start._build

    def failing(*args: Any, **options: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise RuntimeError("out of memory")
        return build(*args, **options)

    start._build = failing


def _vector_fails_on(rank: str) -> None:
    from flexolmo_megatron.training import start

    load = start.load_vector

    def failing(path: Any) -> Any:
        if os.environ["RANK"] == rank:
            raise KeyError("vectors")
        return load(path)

    start.load_vector = failing


def no_vector_on_rank_0() -> None:
    """Rank 0 cannot read the domain vector."""
    _vector_fails_on("0")


def no_vector_on_rank_1() -> None:
    """The file of the domain vector is on the first node alone."""
    _vector_fails_on("1")


def asked_to_stop_while_starting() -> None:
    """Rank 1 is sent SIGTERM before the first step."""
    from flexolmo_megatron.training import run

    build = run.build_datasets

    def signalled(**options: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return build(**options)

    run.build_datasets = signalled


def output_to_a_full_disk() -> None:
    """Nothing that rank 0 prints on standard output can be written."""
    if os.environ["RANK"] == "0":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def slow_steps() -> None:
    """Steps of 50 ms at least, so that a test can act between two of them."""
    from flexolmo_megatron.training import loop

    step = loop.Loop._step

    def slower(self: Any, iterators: Any) -> Any:
        time.sleep(0.05)
        return step(self, iterators)

    loop.Loop._step = slower


def slow_saves() -> None:
    """Writing and completing a checkpoint takes 20 ms more each, so that a test can see it happen."""
    from flexolmo_megatron.training import checkpoint_writer as writer

    def slower(function: Any) -> Any:
        return lambda *args: (time.sleep(0.02), function(*args))[1]

    writer._RankFiles._write_file = slower(writer._RankFiles._write_file)
    writer.write_record = slower(writer.write_record)


def _rank(rank: int, request: dict[str, Any]) -> int:
    """The life of one rank; returns its exit status."""
    log = os.open(f"{request['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(request["ranks"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(request["port"]),
    )
    from flexolmo_megatron.cli import main

    if request["fault"]:
        globals()[request["fault"]]()
    if request["file_limit"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    return main(request["arguments"])


def _serve() -> None:
    from flexolmo_megatron.runtime.setup import prepare

    prepare()
    import flexolmo_megatron.training.run  # noqa: F401

    statuses: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            statuses = dict.fromkeys((_fork(rank, request) for rank in range(request["ranks"])), None)
            answer = list(statuses)
        else:
            for pid in [pid for pid, status in statuses.items() if status is None]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            answer = list(statuses.values())
        print(json.dumps(answer), flush=True)


def _fork(rank: int, request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        status = _rank(rank, request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
