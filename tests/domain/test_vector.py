import io
import json
import os
import pickle
import random
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from flexolmo_megatron.domain import vector as module
from flexolmo_megatron.domain.vector import DomainVector, load_vector, save_vector
from flexolmo_megatron.errors import FlexOlmoError


def unit(rows, width=4, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTOR = DomainVector(vectors=unit(3), embedder="anchor", embedder_digest="0a" * 32, dense_digest="0a" * 32,
                      documents=1000, dropped=2, seed=7, norm=1.0)
METADATA = {"format_version": 1, "embedder": "anchor", "embedder_digest": "0a" * 32, "dense_digest": "0a" * 32,
            "documents": 1000, "dropped": 2, "seed": 7, "norm": 1.0}


def npy(array, allow_pickle=False):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def header(text, content=b"", version=b"\x01\x00"):
    """An .npy file with an arbitrary header."""
    raw = text.encode()
    raw += b" " * (-(len(raw) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(raw).to_bytes(2 if version == b"\x01\x00" else 4, "little") + raw + content


def write(path, vectors=None, metadata=METADATA, extra=(), compression=zipfile.ZIP_STORED):
    if not isinstance(metadata, bytes):
        metadata = npy(np.frombuffer(json.dumps(metadata).encode(), np.uint8))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("vectors.npy", npy(VECTOR.vectors) if vectors is None else vectors)
        archive.writestr("metadata.npy", metadata)
        for name in extra:
            archive.writestr(name, b"")
    return path


def refused(path):
    with pytest.raises(FlexOlmoError) as caught:
        load_vector(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith("; expected a domain vector that 'flexolmo embed' wrote")
    assert "\n" not in message and len(message) < 600
    return message


def same(a, b):
    return np.array_equal(a.vectors, b.vectors) and replace(a, vectors=b.vectors) == b


DISCRIMINANT = replace(VECTOR, vectors=unit(2) * np.float32([[7], [0.5]]), norm=1.5, centred=True,
                       biases=np.array([-3, 0], np.float32))
MOMENTS = np.float32([[[-1, 0, 3, 4], [0, 0, 7, 1e5]], [[1, 1, 2, 1e-5], [1, 2, 3, 4]]])


@pytest.mark.parametrize("vector", [
    VECTOR,
    replace(VECTOR, vectors=unit(1), embedder="GritLM/GritLM-7B", reading="512 tokens, after '<|embed|>'"),
    replace(VECTOR, vectors=unit(2) * np.float32(0.25), norm=0.25, centred=True),
    DISCRIMINANT,
    replace(DISCRIMINANT, moments=MOMENTS),
])
def test_round_trip(tmp_path, vector):
    path = tmp_path / "v.npz"
    save_vector(vector, path)
    loaded = load_vector(path)
    assert np.array_equal(loaded.vectors, vector.vectors) and loaded.vectors.flags.writeable
    assert (loaded.biases is None) == (vector.biases is None) and np.array_equal(loaded.biases, vector.biases)
    assert (loaded.moments is None) == (vector.moments is None) and np.array_equal(loaded.moments, vector.moments)
    for field in set(vars(vector)) - {"vectors", "biases", "moments"}:
        assert getattr(loaded, field) == getattr(vector, field)
    with np.load(path, allow_pickle=False) as plain:  # numpy's own reader agrees
        assert np.array_equal(plain["vectors"], vector.vectors)
        assert json.loads(plain["metadata"].tobytes())["embedder"] == vector.embedder
    assert os.listdir(tmp_path) == ["v.npz"]


def test_rows_and_record():
    assert np.array_equal(VECTOR.row(2), VECTOR.vectors[2])
    one = replace(VECTOR, vectors=unit(1))
    assert np.array_equal(one.row(5), one.vectors[0])
    assert VECTOR.record() == {"embedder": "anchor@0a0a0a0a0a0a", "documents": 1000}
    assert replace(VECTOR, reading="9 tokens").record() == {**VECTOR.record(), "reading": "9 tokens"}
    VECTOR.check_fits(3, 4, "v.npz")
    one.check_fits(32, 4, "v.npz")
    with pytest.raises(FlexOlmoError) as caught:
        VECTOR.check_fits(4, 8, "v.npz")
    assert str(caught.value) == ("v.npz has 3 rows of 4 numbers: expected 4 or 1 of 8, as the model has 4 layers of "
                                 "hidden size 8")


@pytest.mark.parametrize(("change", "message"), [
    ({"vectors": unit(3).astype(np.float64)}, r"^vectors are float64 \[3, 4\]: expected float32 \[layers or 1, hid"),
    ({"vectors": unit(1)[0]}, r"^vectors are float32 \[4\]: expected"),
    ({"vectors": np.zeros((0, 4), np.float32)}, r"^vectors have the shape \[0, 4\]: expected 1 to 4096 rows"),
    ({"vectors": np.full((1, 4), np.nan, np.float32)}, r"^row 0 of the vectors has the norm nan: expected 1$"),
    ({"vectors": np.array([[1, 0], [np.inf, 0]], np.float32)}, r"^row 1 of the vectors has the norm inf: expected 1$"),
    ({"norm": 2.0}, r"^row 0 of the vectors has the norm 1: expected 2$"),
    ({"norm": float("nan")}, r"^norm = nan: expected a number above 0$"),
    ({"embedder": ""}, r"^embedder = '': expected a printable name"),
    ({"embedder": "a\x1b[2J"}, r"^embedder = 'a\\x1b\[2J': expected a printable name"),
    ({"reading": ""}, r"^reading = '': expected a printable text of 1 to 256 characters$"),
    ({"embedder_digest": "x"}, r"^embedder_digest = 'x': expected 64 lower-case hexadecimal digits$"),
    ({"dense_digest": None}, r"^dense_digest = None: expected 64"),
    ({"documents": 0}, r"^documents = 0: expected a whole number of at least 1$"),
    ({"documents": True}, r"^documents = True: expected a whole number"),
    ({"centred": 1}, r"^centred = 1: expected true or false$"),
    ({"dropped": -1}, r"^dropped = -1: expected a whole number of at least 0$"),
    ({"seed": 1.5}, r"^seed = 1.5: expected a whole number"),
])
def test_invalid_values(change, message):
    with pytest.raises(FlexOlmoError, match=message):
        replace(VECTOR, **change)


@pytest.mark.parametrize(("change", "message"), [
    ({"centred": False}, r"^biases are float32 \[2\], centred = False: expected float32 \[2\], one for each row"),
    ({"biases": np.zeros(3, np.float32)}, r"^biases are float32 \[3\], centred = True: expected float32 \[2\]"),
    ({"biases": np.zeros(2)}, r"^biases are float64 \[2\]"),
    ({"biases": np.array([0, 1], np.float32)}, r"^a row has no length between 1e-09 and 1e\+09, or a bias is above 0"),
    ({"biases": np.array([0, np.nan], np.float32)}, "^a row has no length"),
    ({"biases": np.array([0, -np.inf], np.float32)}, "^a row has no length"),
    ({"vectors": np.zeros((2, 4), np.float32)}, "^a row has no length"),
    ({"vectors": np.full((2, 4), 1e-30, np.float32)}, "^a row has no length"),
    ({"vectors": np.full((2, 4), np.nan, np.float32)}, "^a row has no length"),
    ({"moments": MOMENTS.astype(np.float64)}, r"^moments are float64 \[2, 2, 4\]: expected float32 \[2, 2, 4\]"),
    ({"moments": MOMENTS[0]}, r"^moments are float32 \[2, 4\]: expected float32 \[2, 2, 4\]"),
    ({"moments": MOMENTS, "biases": None, "vectors": unit(2), "norm": 1.0}, "expected .* of discriminants alone$"),
    ({"moments": MOMENTS * np.float32([1, 0])[:, None, None]}, "^a mean state is not within .*, or a deviation not"),
    ({"moments": MOMENTS * np.float32([np.nan, 1])[:, None, None]}, "^a mean state is not within"),
])
def test_invalid_discriminants(change, message):
    with pytest.raises(FlexOlmoError, match=message):
        replace(DISCRIMINANT, **change)


def test_missing_and_special_files(tmp_path):
    assert "no such file" in refused(tmp_path / "no.npz")
    assert "not a regular file" in refused(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refused(tmp_path / "fifo")


def test_too_large_a_file_is_not_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    assert "more than 100 bytes" in refused(write(tmp_path / "v.npz"))


class Pickled:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_pickles_are_refused_unopened(tmp_path):
    trap = Pickled(str(tmp_path / "ran"))
    objects = npy(np.array([[trap]], dtype=object), allow_pickle=True)
    assert "vectors is of type 'object': expected float32" in refused(write(tmp_path / "a.npz", objects))
    assert "metadata is of type 'object': expected uint8" in refused(write(tmp_path / "b.npz", metadata=objects))
    assert "vectors has no sound .npy header" in refused(write(tmp_path / "c.npz", pickle.dumps(trap)))
    (tmp_path / "d.npz").write_bytes(pickle.dumps(trap))
    assert "not a sound ZIP archive" in refused(tmp_path / "d.npz")
    assert not os.path.exists(trap.target)
    pickle.loads(pickle.dumps(trap))
    assert os.path.exists(trap.target)  # so it would have


HEADER = "{'descr': '<f4', 'fortran_order': %s, 'shape': %s, }"


@pytest.mark.parametrize(("vectors", "message"), [
    (npy(unit(3).astype(np.float16)), "vectors is of type 'float16': expected float32"),
    (npy(unit(3).astype(">f4")), "vectors is of type '>f4': expected float32"),
    (npy(np.asfortranarray(unit(3))), r"vectors has the shape (3, 4): expected 2 dimensions, row-major"),
    (npy(unit(1)[0]), "vectors has the shape (4,): expected 2 dimensions"),
    (npy(unit(3))[:-4], "vectors has 44 bytes: expected 12 times 4"),
    (header(HEADER % (False, "(1000000000, 1000000000)")), "vectors has 0 bytes: expected 1000000000000000000 times 4"),
    (header(HEADER % (False, "(-1, -12)"), bytes(48)), "vectors has the shape (-1, -12): expected"),
    (header(HEADER % (False, f"(0, {10**30})")), f"vectors has the shape (0, {10**30}): expected 2 dimensions"),
    (header(HEADER % (False, "(True, 12)"), bytes(48)), "vectors has the shape (True, 12): expected"),
    (npy(np.ones((9000, 1), np.float32)), "vectors have the shape [9000, 1]: expected 1 to 4096 rows"),
    (header("{[]: 1}"), "no sound .npy header"),
    (header("(" * 3000), "no sound .npy header"),
    (header("'''\n"), "no sound .npy header"),
    (header(HEADER % (False, "(3, 4)"), bytes(48), b"\x02\x00"), "the .npy version (2, 0): expected (1, 0)"),
    (b"", "no sound .npy header"),
    (npy(np.full((1, 4), np.nan, np.float32)), "row 0 of the vectors has the norm nan: expected 1"),
])
def test_hostile_arrays(tmp_path, vectors, message):
    assert message in refused(write(tmp_path / "v.npz", vectors))


@pytest.mark.parametrize(("metadata", "message"), [
    ([], "the metadata is []: expected a JSON object"),
    ({**METADATA, "format_version": 2}, "format_version = 2: this program reads version 1"),
    ({**METADATA, "format_version": True}, "format_version = True"),
    ({**METADATA, "extra": 1}, "unknown field 'extra' in the metadata"),
    ({key: METADATA[key] for key in METADATA if key != "seed"}, "missing field 'seed' in the metadata"),
    ({**METADATA, "vectors": 1}, "unknown field 'vectors' in the metadata"),
    ({**METADATA, "documents": [1]}, "documents = [1]: expected a whole number"),
    ({**METADATA, "norm": 10**400}, "expected a number above 0"),
    ({**METADATA, "privacy": None}, "privacy = None: expected epsilon, delta and clip"),
    ({**METADATA, "privacy": {"epsilon": 1.0}}, "privacy = {'epsilon': 1.0}: expected epsilon, delta and clip"),
    ({**METADATA, "privacy": {"epsilon": [], "delta": 0.1, "clip": 1.0}}, "epsilon = []: expected a number above 0"),
    ({**METADATA, "norm": "1"}, "norm = '1': expected a number above 0"),
    (npy(np.frombuffer(b'{"format_version": 1, "norm": NaN}', np.uint8)), "NaN is not a JSON number"),
    (npy(np.frombuffer(b'{"seed": 1, "seed": 2}', np.uint8)), "key 'seed' appears twice"),
    (npy(np.frombuffer(b"[" * 100_000, np.uint8)), "JSON"),
])
def test_hostile_metadata(tmp_path, metadata, message):
    assert message in refused(write(tmp_path / "v.npz", metadata=metadata))


def test_hostile_archives(tmp_path):
    message = refused(write(tmp_path / "a.npz", extra=["../../evil.npy"]))
    assert "the archive holds 'vectors.npy', 'metadata.npy', '../../evil.npy': expected vectors.npy and" in message
    assert "the archive is compressed" in refused(write(tmp_path / "b.npz", compression=zipfile.ZIP_DEFLATED))
    bomb = npy(np.zeros((100, 100_000), np.float32))  # 40 MB out of 40 kB
    assert "the archive is compressed" in refused(write(tmp_path / "c.npz", bomb, compression=zipfile.ZIP_DEFLATED))
    with pytest.warns(UserWarning, match="Duplicate name"):
        write(tmp_path / "d.npz", extra=["vectors.npy"])
    assert "the archive holds" in refused(tmp_path / "d.npz")
    (tmp_path / "e.npz").write_bytes(b"")
    assert "not a sound ZIP archive" in refused(tmp_path / "e.npz")


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "v.npz"
    data = write(path).read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refused(path)


def test_damaged_files_are_refused_or_harmless(tmp_path):
    """A flipped bit is found by a checksum or a check, unless it is in a part of the archive that means nothing."""
    path = tmp_path / "v.npz"
    data = write(path).read_bytes()
    chance = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 8])):
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(load_vector(path), VECTOR)
            outcomes[True] += 1
        except FlexOlmoError:
            outcomes[False] += 1
    assert outcomes[False] > 400, outcomes


def test_unwritable_place_leaves_nothing(tmp_path):
    with pytest.raises(FlexOlmoError, match=f"^cannot write {tmp_path}/no/v.npz: No such file or directory"):
        save_vector(VECTOR, tmp_path / "no" / "v.npz")
