"""Random numbers that follow from what they are for, whatever the order of the work and its batches."""

import hashlib


def hash64(*parts: object) -> int:
    """Return 64 bits that depend on the parts, as text, alone."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
