"""The domain vector: what a router row starts from, and its file.

The file is an ``.npz`` (a ZIP archive, nothing compressed) with two arrays: ``vectors`` float32 ``[L, h]`` or
``[1, h]``, and ``metadata``, the UTF-8 bytes of a JSON object with the other fields; discriminants have two more,
``biases`` float32 ``[L]`` and ``moments`` float32 ``[2, L, h]``, the latter not in files of early versions.
``numpy.load`` opens it, but is not used here: the file may come from a stranger, so every size is checked before memory
is allocated, and nothing is ever unpickled. It never holds document text.

Legend: L layers, h hidden size.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_megatron.domain.privacy import GaussianMechanism
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file
from flexolmo_megatron.untrusted import check_digest, parse_strict_json, shown

FORMAT_VERSION = 1
MAX_FILE_BYTES = 192 * 1024 * 1024
"""More than three arrays of 128 layers and hidden size 100,000."""
MAX_LAYERS = 4096
MAX_HIDDEN = 2**20
MAX_NAME = 256
"""Longest name of an embedder, in characters."""

_SHORTEST = 1e-9
"""Of a discriminant's row, and the inverse of the longest: far beyond what is of use, and safe to compute with."""
_OPTIONS = {"privacy", "centred", "reading"}
"""Metadata that the file of a vector without them does not have; ``reading`` is not in files of early versions."""
ARRAYS = ("vectors", "biases", "moments")
"""Fields of a vector that are arrays, the last two of discriminants alone; the others are its metadata."""
_WHAT = "a domain vector that 'flexolmo embed' wrote"


@dataclass(frozen=True)
class DomainVector:
    """The mean embedding of a sample of documents. Building one validates it."""

    vectors: np.ndarray
    """float32 `[L, h]`, one row for each layer's router, or `[1, h]`, the same row for all layers (as in the paper)."""
    embedder: str
    """``anchor``, or the name of the embedding model without any folder."""
    embedder_digest: str
    """SHA-256 (64 hexadecimal digits) of the embedder's weights: vectors of different embedders cannot be compared."""
    dense_digest: str
    """Digest of the anchor's weights without its router row (``as_dense``): equal before and after publication."""
    documents: int
    """Documents whose embeddings were averaged."""
    dropped: int
    """Documents of the sample that were left out because their embedding was not finite."""
    seed: int
    """Of the sample of documents."""
    norm: float
    """Euclidean norm that every row was scaled to; of discriminants, whose length says something, a factor instead."""
    privacy: GaussianMechanism | None = None
    """The noise that was added before, if any; then ``documents`` counts what was not finite, too, as zeros."""
    centred: bool = False
    """Whether the rows are differences from the anchor's own rows, to which ``owner_router`` adds them."""
    reading: str | None = None
    """What decides an embedding beside the embedder's weights, see ``Embedder.reading``. None if that is not known."""
    biases: np.ndarray | None = None
    """Of linear discriminants (``discriminant.py``), which are centred: float32 `[L]`, at most 0. Otherwise None."""

    moments: np.ndarray | None = None
    """Of discriminants: float32 `[2, L, h]`, the mean hidden state of the documents, each counting the same up to the
    longest that is read, and the standard deviation of public tokens' states, by coordinate. What
    ``expert.drift_coeff`` measures by: no package holds it."""

    def __post_init__(self) -> None:
        vectors, name = self.vectors, self.embedder
        if vectors.dtype != np.float32 or vectors.ndim != 2:
            raise FlexOlmoError(f"vectors are {vectors.dtype} {list(vectors.shape)}: expected float32 [layers or 1, "
                                "hidden size]")
        if not (1 <= vectors.shape[0] <= MAX_LAYERS and 1 <= vectors.shape[1] <= MAX_HIDDEN):
            raise FlexOlmoError(f"vectors have the shape {list(vectors.shape)}: expected 1 to {MAX_LAYERS} rows of 1 "
                                f"to {MAX_HIDDEN} numbers")
        if not _is_name(name):
            raise FlexOlmoError(f"embedder = {shown(name)}: expected a printable name of 1 to {MAX_NAME} characters")
        if self.reading is not None and not _is_name(self.reading):
            raise FlexOlmoError(f"reading = {shown(self.reading)}: expected a printable text of 1 to {MAX_NAME} "
                                "characters")
        for key in ("embedder_digest", "dense_digest"):
            check_digest(key, getattr(self, key))
        for key, smallest in (("documents", 1), ("dropped", 0), ("seed", 0)):
            value = getattr(self, key)
            if type(value) is not int or not smallest <= value < 2**63:
                raise FlexOlmoError(f"{key} = {shown(value)}: expected a whole number of at least {smallest}")
        if type(self.norm) is not float or not 0 < self.norm < math.inf:
            raise FlexOlmoError(f"norm = {shown(self.norm)}: expected a number above 0")
        if type(self.centred) is not bool:
            raise FlexOlmoError(f"centred = {shown(self.centred)}: expected true or false")
        if self.moments is not None:
            self._check_moments(self.moments)
        if self.biases is not None:
            self._check_discriminants(self.biases)
            return
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        wrong = ~(np.abs(norms - self.norm) <= 1e-4 * self.norm)  # true for NaN and infinity, too
        if wrong.any():
            row = int(wrong.argmax())
            raise FlexOlmoError(f"row {row} of the vectors has the norm {norms[row]:g}: expected {self.norm:g}")

    def _check_discriminants(self, biases: np.ndarray) -> None:
        if biases.dtype != np.float32 or biases.shape != self.vectors.shape[:1] or not self.centred:
            raise FlexOlmoError(f"biases are {biases.dtype} {list(biases.shape)}, centred = {self.centred}: expected "
                                f"float32 [{len(self.vectors)}], one for each row, and centred vectors")
        lengths = np.linalg.norm(self.vectors.astype(np.float64), axis=1)
        if not ((lengths > _SHORTEST) & (lengths < 1 / _SHORTEST) & (biases > -1 / _SHORTEST) & (biases <= 0)).all():
            raise FlexOlmoError(f"a row has no length between {_SHORTEST:g} and {1 / _SHORTEST:g}, or a bias is above "
                                "0 or no number")

    def _check_moments(self, moments: np.ndarray) -> None:
        if self.biases is None or moments.dtype != np.float32 or moments.shape != (2, *self.vectors.shape):
            raise FlexOlmoError(f"moments are {moments.dtype} {list(moments.shape)}: expected float32 "
                                f"{[2, *self.vectors.shape]}, and of discriminants alone")
        if not ((np.abs(moments) < 1 / _SHORTEST).all() and (moments[1] > _SHORTEST).all()):
            raise FlexOlmoError(f"a mean state is not within {1 / _SHORTEST:g} of 0, or a deviation not from "
                                f"{_SHORTEST:g} to {1 / _SHORTEST:g}")

    def row(self, layer: int) -> np.ndarray:
        """Return the float32 row `[h]` that the router of ``layer`` (from 0) starts from."""
        return self.vectors[layer if len(self.vectors) > 1 else 0]

    def check_fits(self, num_layers: int, hidden_size: int, where: str) -> None:
        """Check that the rows fit a model; ``where`` says in an error whose vector it is.

        Raises:
            FlexOlmoError: another hidden size, or neither one row nor one row for each layer.
        """
        rows, width = self.vectors.shape
        if width != hidden_size or rows not in (1, num_layers):
            raise FlexOlmoError(f"{where} has {rows} row{'s' * (rows > 1)} of {width} numbers: expected {num_layers} "
                                f"or 1 of {hidden_size}, as the model has {num_layers} layers of hidden size "
                                f"{hidden_size}")

    def check_made_with(self, dense_digest: str, where: str, anchor: str) -> None:
        """Check that the rows are of an anchor's own hidden states, or were projected for it.

        Args:
            dense_digest: of the anchor.
            where, anchor: name the vector and the anchor in an error.

        Raises:
            FlexOlmoError: they were made for another one.
        """
        if self.dense_digest != dense_digest:
            raise FlexOlmoError(f"{where} was made for another anchor (digest {self.dense_digest[:12]}…): expected one "
                                f"for {anchor} (digest {dense_digest[:12]}…)")

    def record(self) -> dict[str, Any]:
        """How the row was made, as a checkpoint's card (``ExpertRecord.router``) and an expert package store it."""
        made = {**embedder_record(self.embedder, self.embedder_digest, self.reading), "documents": self.documents}
        kind = {"discriminant": self.biases is not None, "centred": self.centred}
        return made | next(({name: True} for name, holds in kind.items() if holds), {})


def embedder_record(name: str, digest: str, reading: str | None) -> dict[str, str]:
    """What a record says of the embedder."""
    return {"embedder": f"{name}@{digest[:12]}"} | ({"reading": reading} if reading else {})


def same_reading(one: str | None, other: str | None) -> bool:
    """Whether documents were read in the same way, as far as is known: early versions did not say."""
    return None in (one, other) or one == other


def same_embedder(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of rows by the same embedder, whatever its name, that reads in the same way."""
    digests = {str(record.get("embedder", "")).rpartition("@")[2] for record in (one, other)}
    return len(digests) == 1 and same_reading(one.get("reading"), other.get("reading"))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_NAME and value.isprintable()


def save_vector(vector: DomainVector, path: str | os.PathLike) -> None:
    """Write the file, atomically.

    Raises:
        FlexOlmoError: it cannot be written.
    """
    values = {key: value for key, value in asdict(vector).items() if key not in ARRAYS}
    for option in _OPTIONS:
        if not values[option]:
            del values[option]
    metadata = json.dumps({"format_version": FORMAT_VERSION, **values}, ensure_ascii=False).encode()
    arrays = {name: np.ascontiguousarray(array, "<f4") for name in ARRAYS
              if (array := getattr(vector, name)) is not None}
    with atomic_file(path) as file:
        np.savez(file, **arrays, metadata=np.frombuffer(metadata, np.uint8))


def load_vector(path: str | os.PathLike) -> DomainVector:
    """Read a file that ``save_vector`` wrote, from whomever it came.

    Raises:
        FlexOlmoError: it is missing, damaged, too large, or anything but such a file.
    """
    path = Path(path)
    try:
        return _parse(_read(path))
    except FlexOlmoError as error:
        raise FlexOlmoError(f"{path}: {error}; expected {_WHAT}") from None


def _read(path: Path) -> bytes:
    try:
        if not path.exists():
            raise FlexOlmoError("no such file")
        if not path.is_file():  # also keeps us from waiting for the writer of a FIFO
            raise FlexOlmoError("not a regular file")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise FlexOlmoError(f"cannot be read ({error.strerror})") from None
    if len(data) > MAX_FILE_BYTES:
        raise FlexOlmoError(f"more than {MAX_FILE_BYTES} bytes")
    return data


def _members(data: bytes) -> dict[str, bytes]:
    """The contents of a vector's archive, which are uncompressed: they cannot be larger than the archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            names, files = [entry.filename for entry in entries], [f"{name}.npy" for name in ARRAYS]
            if sorted(names) not in (sorted([*files[:count], "metadata.npy"]) for count in (1, 2, 3)):
                found = ", ".join(map(shown, names[:5])) or "nothing"
                raise FlexOlmoError(f"the archive holds {found}: expected {files[0]} and metadata.npy, and perhaps "
                                    f"{' and '.join(files[1:])}")
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data) for entry in entries):
                raise FlexOlmoError("the archive is compressed")
            return {name: archive.read(name) for name in names}  # checks the CRC
    except FlexOlmoError:
        raise
    except Exception as error:  # zipfile passes on whatever struct, the codecs and seeking raise on a damaged archive
        raise FlexOlmoError(f"not a sound ZIP archive ({shown(str(error) or type(error).__name__)})") from None


def _array(data: bytes, name: str, dtype: str, dimensions: int) -> np.ndarray:
    """The array in the bytes of an .npy file, which must have this dtype and number of dimensions."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise FlexOlmoError(f"{name} has the .npy version {version}: expected (1, 0)")
        shape, fortran_order, found = np.lib.format.read_array_header_1_0(stream)
    except FlexOlmoError:
        raise
    except Exception as error:  # numpy passes on whatever literal_eval and tokenize raise on a strange header
        raise FlexOlmoError(f"{name} has no sound .npy header ({shown(str(error) or type(error).__name__)})") from None
    if found != np.dtype(dtype):
        raise FlexOlmoError(f"{name} is of type {shown(str(found))}: expected {np.dtype(dtype).name}")
    if fortran_order or len(shape) != dimensions or not all(type(size) is int and size > 0 for size in shape):
        raise FlexOlmoError(f"{name} has the shape {shown(shape)}: expected {dimensions} dimensions, row-major")
    content = memoryview(data)[stream.tell():]
    if math.prod(shape) * found.itemsize != len(content):
        raise FlexOlmoError(f"{name} has {len(content)} bytes: expected {math.prod(shape)} times {found.itemsize}, "
                            f"as its shape is {shown(shape)}")
    return np.frombuffer(content, found).reshape(shape)


def _parse(data: bytes) -> DomainVector:
    members = _members(data)
    values = parse_strict_json(_array(members["metadata.npy"], "metadata", "|u1", 1).tobytes())
    if not isinstance(values, dict):
        raise FlexOlmoError(f"the metadata is {shown(values)}: expected a JSON object")
    version = values.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise FlexOlmoError(f"format_version = {shown(version)}: this program reads version {FORMAT_VERSION}")
    expected = {field.name for field in fields(DomainVector)} - {*ARRAYS} - _OPTIONS
    for key in (values.keys() - _OPTIONS) ^ expected:
        raise FlexOlmoError(f"{'unknown' if key in values else 'missing'} field {shown(key)} in the metadata")
    if "privacy" in values:
        mechanism = values["privacy"]
        if not isinstance(mechanism, dict) or mechanism.keys() != {"epsilon", "delta", "clip"}:
            raise FlexOlmoError(f"privacy = {shown(mechanism)}: expected epsilon, delta and clip")
        values["privacy"] = GaussianMechanism(**mechanism)
    for name, dimensions in (("biases", 1), ("moments", 3)):
        if f"{name}.npy" in members:
            values[name] = _array(members[f"{name}.npy"], name, "<f4", dimensions).astype(np.float32)
    return DomainVector(vectors=_array(members["vectors.npy"], "vectors", "<f4", 2).astype(np.float32), **values)
