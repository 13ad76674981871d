"""Writing files so that a reader sees the old content or the new content, never a part of either.

Everything is written under a temporary name in the destination's own folder, flushed to disk, then renamed.
An existing destination is never touched before the new one is complete.

The temporary name of ``NAME`` is ``.NAME.HOST.PID.partial``, with the host and the process that write it. It is gone
when the write ends, however it ends, unless the process was killed outright. What such a process left behind is removed
by the next write of the same destination on the same host; until then it is safe to delete by hand, and no part of this
package reads it. What a living process, another host or another destination left is never touched.
"""

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flexolmo_megatron.errors import FlexOlmoError

TEMPORARY_SUFFIX = ".partial"
_TEMPORARY_NAME = re.compile(rf"\.(?P<name>.+?)(?:\.(?P<host>.+))?\.(?P<process>\d+){re.escape(TEMPORARY_SUFFIX)}")


def fsync_path(path: Path) -> None:
    """Flush ``path`` (a file or a directory) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(path: Path) -> str:
    return f".{path.name}.{socket.gethostname()}."


def temporary_path(path: Path) -> Path:
    """Where this process writes, or removes, what is or will be at ``path``."""
    return path.with_name(f"{_prefix(path)}{os.getpid()}{TEMPORARY_SUFFIX}")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; or no process at all, so not a name of ours
        pass
    return True


def _sweep(path: Path) -> None:
    """Remove what dead processes of this host left behind when they wrote ``path``; what cannot be removed stays."""
    prefix = _prefix(path)
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    for name in names:
        process = name.removeprefix(prefix).removesuffix(TEMPORARY_SUFFIX)
        if name != f"{prefix}{process}{TEMPORARY_SUFFIX}" or not (process.isascii() and process.isdigit()):
            continue
        # To ``kill``, 0 is a whole group of processes. Of our own number, only an earlier process can have left it.
        if int(process) > 0 and (int(process) == os.getpid() or not _is_alive(int(process))):
            _remove(path.with_name(name))


def make_temporary_folder(path: Path) -> Path:
    """Make the folder in which this process writes what will be at ``path``; see ``temporary_path``.

    Raises:
        OSError: it cannot be made.
    """
    temporary = temporary_path(path)
    _sweep(path)
    temporary.mkdir(parents=True)
    return temporary


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """``make_temporary_folder`` for a block: it is gone afterwards, with those of its parents that are new and empty.

    Raises:
        OSError: it cannot be made.
    """
    new = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        yield make_temporary_folder(path)
    finally:
        shutil.rmtree(temporary_path(path), ignore_errors=True)
        for folder in new:
            with contextlib.suppress(OSError):  # what was written is in it
                folder.rmdir()


def sweep_folder(folder: Path, names: re.Pattern[str]) -> list[str]:
    """Remove what killed processes, of any host, left in ``folder`` when they wrote things with such ``names``.

    For a folder that only one launch at a time writes to. What a living process of this host writes is left alone.

    Returns:
        The names of what was removed.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _TEMPORARY_NAME.fullmatch(path.name)
        if not match or not names.fullmatch(match["name"]):
            continue
        process = int(match["process"])
        if match["host"] == socket.gethostname() and process not in (0, os.getpid()) and _is_alive(process):
            continue
        _remove(path)
        removed.append(path.name)
    return removed


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def cannot_write(path: Path, error: OSError) -> FlexOlmoError:
    """Say why ``path`` was not written."""
    return FlexOlmoError(f"cannot write {path}: {error.strerror or error}; nothing was changed there")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces ``path`` when the block ends without an exception.

    Args:
        path: the destination; its folder must exist.
        mode: of ``open``, for writing.

    Raises:
        FlexOlmoError: the file cannot be written (missing folder, full disk, no permission).
    """
    path = Path(path)
    temporary = temporary_path(path)
    _sweep(path)
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # gone already; or on a read-only disk, which even then refuses to remove it
            temporary.unlink()


def check_free(directory: str | os.PathLike) -> None:
    """Check that results can go into ``directory``: before long work, and not only after it.

    Raises:
        FlexOlmoError: it is a file, a folder that is not empty, or in a folder that cannot be written.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FlexOlmoError(f"{path} already exists; name a new directory or remove it first")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise FlexOlmoError(f"cannot write {path}: {parent} is not a folder that can be written; nothing was changed "
                            "there")


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` when the block ends without an exception.

    The destination must not exist, or be an empty directory: results are never overwritten.

    Raises:
        FlexOlmoError: the destination is taken, or cannot be written.
    """
    path = Path(path)
    check_free(path)
    try:
        with temporary_folder(path) as temporary:
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    fsync_path(Path(folder, name))
                fsync_path(Path(folder))
            if path.exists():
                path.rmdir()
            os.replace(temporary, path)
            fsync_path(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | os.PathLike, what: str) -> Any:
    """Read a JSON file that the user named; ``what`` says in an error what it should have been."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FlexOlmoError(f"{path} does not exist; expected {what}") from None
    except RecursionError:
        raise FlexOlmoError(f"{path} cannot be read as {what}: nested too deeply") from None
    except (OSError, ValueError) as error:  # bad UTF-8, bad JSON, integers of thousands of digits
        raise FlexOlmoError(f"{path} cannot be read as {what}: {error}") from error
