"""Hundreds of mutated packages: each is refused with a FlexOlmoError of one line, and nothing is written.

Left out by construction are mutations after which a package is still a sound one, only another: white space of the
JSON; name, owner, licence, contact, router and training of the manifest, which may hold any value (lines with these
keys are not flipped); finite other weights together with their own sha256 (tensor data is flipped without resealing).
"""

import json
import os
import pickle
import random
import re
import struct

import pytest
import torch

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.merge import write_merged
from flexolmo_megatron.exchange.verify import AnchorReference, verify

FREE = ("name", "owner", "licence", "contact", "embedder", "documents", "tokens", "steps", "lr", "seed")
WORDS = ["../../../etc/passwd", "/dev/zero", "..", "", "\0", "layers.0.gate_proj ", "layers.-1.router",
         "layers.0.Router", "layers.0.router\n", "layers.0.rоuter", "__metadata__", "\ud83d", "%s%n", "$(id)",
         "layers.0.router/../bias"]
HUGE = "HUGE"  # becomes an integer of 5,001 digits, more than Python converts
VALUES = [None, True, -1, 0, 1.5, 2**63, HUGE, "1", "NaN", [], [[]], {}, {"a": 1}, "\x1b[2J", "x" * 10_000,
          float("inf"), float("nan")]


def flip(data: bytes, rng: random.Random, allowed=None) -> bytes:
    changed = bytearray(data)
    changed[rng.choice(allowed) if allowed else rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


# Each mutation takes (raw, path, rng), writes the mutated package to path and seals it unless its name says otherwise.

def flip_tensor_file_unsealed(raw, path, rng):
    raw.manifest_text()
    raw.write(path, tensor_file=flip(raw.tensor_file(), rng), seal=False)


def flip_tensor_header(raw, path, rng):
    file = raw.tensor_file()
    text = file.index(b"}}", 8) + 2  # the padding after it is white space
    raw.write(path, tensor_file=flip(file, rng, range(text)))


def flip_manifest(raw, path, rng):
    allowed, position = [], 0
    for line in raw.manifest_text().splitlines(keepends=True):
        if not any(f'"{key}"' in line for key in FREE):
            allowed += range(position, position + len(line.encode()))
        position += len(line.encode())
    raw.write(path, manifest=flip(raw.manifest_text().encode(), rng, allowed))


def truncate_tensor_file(raw, path, rng):
    file = raw.tensor_file()
    raw.write(path, tensor_file=file[:rng.randrange(len(file))], seal=rng.random() < 0.5)


def truncate_manifest(raw, path, rng):
    text = raw.manifest_text().encode()
    raw.write(path, manifest=text[:rng.randrange(len(text))])


def append_to_tensor_file(raw, path, rng):
    raw.write(path, tensor_file=raw.tensor_file() + rng.randbytes(rng.choice([1, 2, 4096])))


def change_dtype(raw, path, rng):
    name, entry = rng.choice(list(raw.header.items()))
    dtypes = ["F16", "F32", "I16", "U8", "F64", "BOOL", "BF16", "F8_E4M3", "", "bf16", 3, None]
    entry["dtype"] = rng.choice([dtype for dtype in dtypes if dtype != entry["dtype"]])
    if entry["dtype"] == "U8":
        entry["shape"] = [entry["data_offsets"][1] - entry["data_offsets"][0]]
    raw.write(path)


def change_shape(raw, path, rng):
    entry = rng.choice([entry for name, entry in raw.header.items() if "proj" in name])
    shape = entry["shape"]
    entry["shape"] = rng.choice([shape[::-1], [96], [1, *shape], [4, 24], [-12, -8], [12.0, 8], ["12", "8"],
                                 [2**62, 2**62], [12, 8, 1, 1, 1, 1, 1, 1, 1], None, "12,8", {}, [12, True], [[12], 8]])
    raw.write(path)


def change_offsets(raw, path, rng):
    entry = rng.choice(list(raw.header.values()))
    start, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice([[end, start], [start + 2, end + 2], [0, 2**63], [-2, end], [start],
                                        [start, end, end], [float(start), end], None, "0",
                                        [start, 2**64], [start - 2, end - 2]])
    raw.write(path)


def swap_offsets_of_different_sizes(raw, path, rng):
    row, matrix = raw.header[f"layers.{rng.randrange(2)}.router"], raw.header[f"layers.{rng.randrange(2)}.up_proj"]
    row["data_offsets"], matrix["data_offsets"] = matrix["data_offsets"], row["data_offsets"]
    raw.write(path)


def rename_tensor(raw, path, rng):
    old, new = rng.choice(list(raw.header)), rng.choice(WORDS)
    raw.header = {new if key == old else key: value for key, value in raw.header.items()}
    raw.write(path)


def add_tensor(raw, path, rng):
    size = rng.choice([0, 1, 7])
    offsets = [len(raw.data), len(raw.data) + 2 * size]
    raw.header[rng.choice(WORDS)] = {"dtype": "BF16", "shape": [size], "data_offsets": offsets}
    raw.data += b"\0\0" * size
    raw.write(path)


def change_header_entry(raw, path, rng):
    name, entry = rng.choice(list(raw.header.items()))
    key = rng.choice(["dtype", "shape", "data_offsets", None, "extra"])
    if key is None:
        raw.header[name] = rng.choice(VALUES)
    elif key == "extra":
        entry["extra"] = 1
    else:
        del entry[key]
    raw.write(path)


def change_header_length(raw, path, rng):
    file = raw.tensor_file()
    length = struct.unpack("<Q", file[:8])[0]
    new = rng.choice([0, 1, 2**63, 2**64 - 1, 2**32, length + 8, length - 8, len(file), 2**22 + 1,
                      rng.getrandbits(64)])
    raw.write(path, tensor_file=struct.pack("<Q", new) + file[8:])


def nest_header(raw, path, rng):
    depth = rng.choice([100, 10_000, 500_000])
    header = (rng.choice(["[", '{"a":'])) * depth
    raw.write(path, tensor_file=struct.pack("<Q", len(header)) + header.encode() + raw.data)


def duplicate_header_key(raw, path, rng):
    name = rng.choice(list(raw.header))
    header = (json.dumps(raw.header)[:-1] + f', "{name}": {json.dumps(raw.header[name])}}}').encode()
    raw.write(path, tensor_file=struct.pack("<Q", len(header)) + header + raw.data)


def duplicate_manifest_key(raw, path, rng):
    key, value = rng.choice(list(raw.manifest.items()))
    raw.write(path, manifest=(raw.manifest_text().rstrip()[:-1] + f', "{key}": {json.dumps(value)}}}').encode())


def nest_manifest(raw, path, rng):
    depth = rng.choice([30, 1000, 10_000])
    raw.manifest[rng.choice(list(raw.manifest))] = ...
    text = json.dumps(raw.manifest, default=lambda _: "HERE").replace('"HERE"', "[" * depth + "]" * depth)
    raw.write(path, manifest=text.encode())


def change_manifest_value(raw, path, rng):
    raw.manifest_text()
    key = rng.choice(["format_version", "anchor_digest", "sha256", "architecture"])
    value = rng.choice(VALUES)
    raw.manifest[key] = value
    raw.write(path, manifest=as_json(raw.manifest), seal=False)


def change_architecture(raw, path, rng):
    raw.manifest_text()
    key = rng.choice(list(raw.manifest["architecture"]))
    raw.manifest["architecture"][key] = rng.choice([*VALUES, 1, 3, 7, 9, 11, 13, 2**31, 2**31 + 1, "F16", "F32", "I8"])
    raw.write(path, manifest=as_json(raw.manifest), seal=False)


def change_type_in_free_fields(raw, path, rng):
    raw.manifest_text()
    key = rng.choice(["name", "owner", "licence", "contact", "router", "training"])
    raw.manifest[key] = rng.choice([None, True, -1, 1.5, [], [[]], {"a": 1}, HUGE])
    raw.write(path, manifest=as_json(raw.manifest), seal=False)


def drop_or_add_manifest_key(raw, path, rng):
    where = rng.choice([raw.manifest, raw.manifest["architecture"]])
    if rng.random() < 0.5:
        del where[rng.choice([key for key in where if key != "sha256"])]
    else:
        where[rng.choice(["Name", "sha-256", "__proto__", "path", "\0", "format_version "])] = 1
    raw.write(path)


def hostile_name(raw, path, rng):
    raw.manifest["name"] = rng.choice([*WORDS[:5], "a/b", "a\\b", "..a", "a..b", "public", "Public", "a" * 65,
                                       "a\n", "a b", "ａ"])
    raw.write(path)


def other_digest(raw, path, rng):
    raw.manifest["anchor_digest"] = rng.randbytes(32).hex()
    raw.write(path)


def not_finite(raw, path, rng):
    bits = rng.choice([0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF, 0x7FFF])  # infinities, quiet and signalling NaN
    at = rng.randrange(len(raw.data) // 2) * 2
    raw.data[at:at + 2] = struct.pack("<H", bits)
    raw.write(path)


def pickled(raw, path, rng):
    value = rng.choice([{"a": torch.ones(3)}, torch.ones(3), [1, 2], raw.header])
    if rng.random() < 0.5:
        torch.save(value, path.with_suffix(".x"), _use_new_zipfile_serialization=rng.random() < 0.5)
        data = path.with_suffix(".x").read_bytes()
    else:
        data = pickle.dumps(value, protocol=rng.randrange(6))
    raw.write(path, tensor_file=data)


def entry_beside(raw, path, rng):
    raw.write(path)
    name = rng.choice(["a.pt", "b.pkl", "c.bin", "README.md", ".DS_Store", "manifest.json~", "expert.safetensors.1",
                       "é"])
    if rng.random() < 0.3:
        (path / name).symlink_to("/etc/passwd")
    else:
        (path / name).write_bytes(b"")


def not_a_regular_file(raw, path, rng):
    raw.write(path)
    victim = path / rng.choice(["manifest.json", "expert.safetensors"])
    os.rename(victim, path.with_suffix(".moved"))
    kind = rng.randrange(5)
    if kind == 0:
        victim.symlink_to(path.with_suffix(".moved"))
    elif kind == 1:
        victim.symlink_to(rng.choice(["/dev/zero", "/dev/stdin", "/nowhere", victim.name, "."]))
    elif kind == 2:
        os.mkfifo(victim)
    elif kind == 3:
        victim.mkdir()


def as_json(value) -> bytes:
    return json.dumps(value, indent=2).replace('"HUGE"', "1" + "0" * 5000).encode()


MUTATIONS = {mutation: count for count, mutations in {
    40: [flip_tensor_file_unsealed, flip_tensor_header, flip_manifest],
    15: [truncate_tensor_file, truncate_manifest, change_dtype, change_shape, change_offsets, rename_tensor, add_tensor,
         change_header_entry, change_header_length, change_manifest_value, change_architecture, not_finite, pickled,
         change_type_in_free_fields, drop_or_add_manifest_key, hostile_name, not_a_regular_file],
    6: [append_to_tensor_file, swap_offsets_of_different_sizes, nest_header, duplicate_header_key,
        duplicate_manifest_key, nest_manifest, other_digest, entry_beside],
}.items() for mutation in mutations}


def test_there_are_enough():
    assert sum(MUTATIONS.values()) >= 400


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_is_refused(mutation, make_package, raw_package, anchor, digest, tmp_path):
    original, other = make_package("math"), make_package("other", seed=2)
    reference = AnchorReference.of(anchor, digest)
    write_merged(anchor, [other, original], tmp_path / "sound", format="hf")
    for seed in range(MUTATIONS[mutation]):
        path = tmp_path / f"mutated_{seed}"
        mutation(raw_package(original), path, random.Random(f"{mutation.__name__} {seed}"))
        for use in (lambda path=path: verify(path, reference),
                    lambda path=path: write_merged(anchor, [other, path], tmp_path / "out" / "merged",
                                                   format="hf")):
            (tmp_path / "out").mkdir(exist_ok=True)
            try:
                use()
            except FlexOlmoError as error:
                assert re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]{20,800}", str(error)), (seed, str(error))
                assert str(error).encode()
            else:
                pytest.fail(f"seed {seed} was accepted")
            assert not list((tmp_path / "out").iterdir())
