"""Taking a package apart into its manifest, header and data, and putting a changed one back together."""

import hashlib
import json
import struct
from pathlib import Path


class RawPackage:
    """A package as plain values; ``write`` keeps the manifest's sha256 consistent unless told not to."""

    def __init__(self, path: Path) -> None:
        self.manifest = json.loads((path / "manifest.json").read_text())
        data = (path / "expert.safetensors").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        self.header = json.loads(data[8:8 + length])
        self.data = bytearray(data[8 + length:])

    def tensor_file(self) -> bytes:
        header = json.dumps(self.header).encode()
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header + self.data

    def write(self, path: Path, *, tensor_file: bytes | None = None, manifest: bytes | None = None, seal: bool = True) -> Path:
        tensor_file = self.tensor_file() if tensor_file is None else tensor_file
        if seal:
            self.manifest["sha256"] = hashlib.sha256(tensor_file).hexdigest()
        path.mkdir()
        (path / "expert.safetensors").write_bytes(tensor_file)
        (path / "manifest.json").write_bytes(json.dumps(self.manifest, indent=2).encode() if manifest is None else manifest)
        return path

    def manifest_text(self, tensor_file: bytes | None = None) -> str:
        """The manifest as text, sealed for ``tensor_file``, to be edited as text."""
        self.manifest["sha256"] = hashlib.sha256(self.tensor_file() if tensor_file is None else tensor_file).hexdigest()
        return json.dumps(self.manifest, indent=2)
