"""The digest of a model: what every expert package names to say which anchor it was trained against.

It is one SHA-256 over the tensors in ascending order of their names (order of the UTF-8 bytes). Each contributes

    name in UTF-8, 0x00,
    dtype as safetensors spells it (ASCII: BF16, F32, ...), 0x00,
    shape in decimal with commas ("4096,11008"; nothing for a scalar), 0x00,
    the elements, little-endian, row-major, without padding.

No separator follows the elements: their number of bytes follows from dtype and shape. Names are the canonical ones
of ``convert/names.py``, so the digest does not depend on sharding, file layout or format. To recompute it from one
safetensors file: ``for name in sorted(f.keys())``, hash the three fields, then the tensor's raw bytes.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator

import torch

from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.safetensors_io import DTYPES, as_bytes
from flexolmo_megatron.errors import FlexOlmoError

Buffer = bytes | bytearray | memoryview

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def digest_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[Buffer]]]) -> str:
    """Return the digest of ``(name, dtype, shape, chunks of bytes)``, in ascending order of names: 64 hex digits.

    Raises:
        FlexOlmoError: names out of order or repeated, or chunks that do not add up to dtype and shape.
    """
    sha = hashlib.sha256()
    previous = b""
    for name, dtype, shape, chunks in tensors:
        encoded = name.encode()
        if encoded <= previous or b"\0" in encoded:
            raise FlexOlmoError(f"tensor {name!r} after {previous.decode()!r}: a digest needs unique names in "
                                "ascending order")
        previous = encoded
        sha.update(b"\0".join((encoded, dtype.encode(), ",".join(map(str, shape)).encode(), b"")))
        length = 0
        for chunk in chunks:
            sha.update(chunk)
            length += len(chunk)
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if length != expected:
            raise FlexOlmoError(f"tensor {name!r} has {length} bytes, but its dtype and shape need {expected}")
    return sha.hexdigest()


def model_digest(model: LazyModel, progress: Callable[[int], object] | None = None) -> str:
    """Return the digest of ``model``, holding one tensor at a time; ``progress`` gets the number of bytes of each."""

    def chunks(name: str) -> Iterator[memoryview]:
        data = as_bytes(model.tensors[name].read())
        yield data
        if progress is not None:
            progress(len(data))

    names = sorted(model.tensors, key=str.encode)
    return digest_tensors(
        (name, DTYPE_NAMES[model.tensors[name].dtype], model.tensors[name].shape, chunks(name)) for name in names
    )


class BackgroundDigest:
    """``model_digest`` in a thread, beside whatever else reads the model (hashlib and file reads release the GIL)."""

    def __init__(self, model: LazyModel) -> None:
        self._result: str | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(model,), name="digest", daemon=True)
        self._thread.start()

    def _run(self, model: LazyModel) -> None:
        try:
            self._result = model_digest(model, self._check_stopped)
        except BaseException as error:  # handed to the thread that asks
            self._error = error

    def _check_stopped(self, _: int) -> None:
        if self._stopped:
            raise InterruptedError

    def stop(self) -> None:
        """Give up the digest and wait for the thread to end."""
        self._stopped = True
        self._thread.join()

    def ready(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> str:
        """Wait for the digest and return it, or raise what reading the model raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result
