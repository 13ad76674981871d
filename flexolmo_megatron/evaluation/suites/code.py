"""Running programs that a model has written: in a process of their own, with limits, yet not in a sandbox."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time

SECONDS = 10
"""That a program may take."""
_MEMORY = 4 * 1024**3
_REACHED_ITS_END = 117
"""Exit status of a program that has come to its last line: 0 is also that of one that leaves before its tests."""


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024**2, 1024**2))


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program comes to its last line, within ``seconds``, and without an error.

    It runs with an empty environment in a folder that is removed afterwards; then processes that it has started are
    killed, but for those of a session of their own. It can still read what this user may read and reach the network:
    run it in a container.
    """
    program += f"\n__import__('os')._exit({_REACHED_ITS_END})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.Popen([sys.executable, "-I", "-c", program], cwd=folder, env={},
                                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       preexec_fn=_limit, start_new_session=True)
        except (OSError, ValueError):
            return False
        deadline = time.monotonic() + seconds
        try:
            # Without reaping it: until then no other group of processes can get its number.
            while (os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
                   and time.monotonic() < deadline):
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    return status == _REACHED_ITS_END
