"""Running a test's function in several processes that talk over gloo: the one runner for every sharded test.

Each process is a fresh interpreter that loads the file of the function, so importing that file must be cheap and free
of side effects.
"""

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on, all different."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def run_distributed(function: Callable, world_size: int, *args: Any, timeout: float = 180,
                    python: Path | str = sys.executable) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes with the variables that torchrun would set.

    Args:
        function: at the top level of its file.
        world_size: number of processes.
        args: picklable.
        timeout: seconds, for all processes together.
        python: of another environment.

    Returns:
        What each rank returned, in their order.

    Raises:
        AssertionError: a process failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder, "call")
        call.write_bytes(pickle.dumps((function.__code__.co_filename, function.__name__, args)))
        (port,) = free_ports(1)
        processes = []
        for rank in range(world_size):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }
            with open(Path(folder, f"log{rank}"), "wb") as log:
                processes.append(subprocess.Popen([str(python), __file__, str(call)], env=environment, stdout=log,
                                                  stderr=subprocess.STDOUT, cwd=ROOT))
        _wait(processes, timeout)
        logs = [f"rank {rank}, status {process.returncode}:\n{Path(folder, f'log{rank}').read_text(errors='replace')}"
                for rank, process in enumerate(processes) if process.returncode != 0]
        assert not logs, "\n".join(log[-4000:] for log in logs)
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen], timeout: float) -> None:
    """Wait until all have ended, or one has failed and the others, which would wait for it, are killed."""
    deadline = time.monotonic() + timeout
    try:
        while None in (statuses := [process.poll() for process in processes]):
            if any(statuses) or time.monotonic() > deadline:
                return
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _main(call: Path) -> None:
    path, name, args = pickle.loads(call.read_bytes())
    spec = importlib.util.spec_from_file_location("distributed_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = getattr(module, name)(*args)
    call.with_name(f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()  # as `flexolmo train` ends: left to the interpreter, gloo aborts at times


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
