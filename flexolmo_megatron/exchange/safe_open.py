"""Opening files that a stranger provided: no links followed, no device or FIFO opened, bounded sizes."""

import os
import stat
from pathlib import Path

from flexolmo_megatron.errors import FlexOlmoError

PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".npy", ".npz", ".joblib", ".distcp")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def open_directory(path: Path, expected_names: tuple[str, ...], what: str) -> int:
    """Return a descriptor of the directory ``path``, which must hold exactly the entries ``expected_names``.

    Files are then opened relative to the descriptor, so that replacing the directory changes nothing.

    Raises:
        FlexOlmoError: it is not a directory, an entry is missing, or there is another one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FlexOlmoError(f"{path} does not exist; expected {what}") from None
    except OSError as error:
        raise FlexOlmoError(f"{path} cannot be opened as a directory ({error.strerror}); expected {what}") from None
    try:
        found = set()
        with os.scandir(descriptor) as entries:
            for entry in entries:
                if entry.name.lower().endswith(PICKLE_SUFFIXES):
                    raise FlexOlmoError(f"{path} holds {ascii(entry.name)}, which may be pickled and is refused; "
                                        f"expected {what}")
                if entry.name not in expected_names:
                    raise FlexOlmoError(f"{path} holds the unexpected entry {ascii(entry.name)}; expected {what}")
                found.add(entry.name)
        for name in expected_names:
            if name not in found:
                raise FlexOlmoError(f"{path} holds no {name}; expected {what}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(directory: int, name: str, where: str) -> int:
    """Open the regular file ``name`` in ``directory`` for reading; return its descriptor.

    Raises:
        FlexOlmoError: it is a symbolic link, a FIFO, a device, a socket, a directory, or cannot be read.
    """
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):  # opening a device can already have effects, so look first
            # and if it was replaced since: neither follow a link nor wait for a FIFO's writer
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=directory)
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                return descriptor
            os.close(descriptor)
    except OSError as error:
        raise FlexOlmoError(f"{where} cannot be read: {error.strerror}") from None
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory",
             stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise FlexOlmoError(f"{where} is {kind}; expected a regular file")


def read_start(descriptor: int, limit: int, where: str) -> bytes:
    """Read the first bytes of a file, at most ``limit`` of them.

    Raises:
        FlexOlmoError: it cannot be read.
    """
    data = b""
    try:
        while len(data) < limit and (more := os.pread(descriptor, limit - len(data), len(data))):
            data += more
    except OSError as error:
        raise FlexOlmoError(f"{where} cannot be read: {error.strerror}") from None
    return data


def looks_pickled(start: bytes) -> bool:
    """Whether a file that starts so, with nine bytes, is a pickle or a zip archive, which is what torch.save writes.

    Safetensors files begin with eight bytes that hold any number, and may be a pickle's first ones; then comes JSON.
    """
    return start.startswith(_PICKLE_STARTS) and start[8:] != b"{"
