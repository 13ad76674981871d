"""Running programs that a model has written: in a process of their own, with limits, yet not in a sandbox."""

import resource
import subprocess
import sys
import tempfile

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

    It runs with an empty environment in a folder that is removed afterwards. It can still read what this user may read
    and reach the network: run it in a container.
    """
    program += f"\n__import__('os')._exit({_REACHED_ITS_END})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run([sys.executable, "-I", "-c", program], cwd=folder, env={}, timeout=seconds,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  preexec_fn=_limit, start_new_session=True)
        except (subprocess.TimeoutExpired, OSError, ValueError):
            return False
    return done.returncode == _REACHED_ITS_END
