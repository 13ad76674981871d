"""From an embedding model's dimension to the hidden size: a fixed orthogonal map, which every owner derives alike."""

import numpy as np


def orthogonal_projection(rows: int, columns: int, digest: str) -> np.ndarray:
    """Return a float64 matrix `[rows, columns]` that is drawn from the hexadecimal ``digest`` and orthonormal.

    Its rows are orthonormal where rows <= columns (inner products of row vectors ``x @ matrix`` are kept), its columns
    otherwise. The same digest gives the same matrix up to rounding on any machine and with any version of numpy.
    """
    # Not numpy's newer Generator: its streams may change between versions (NEP 19), and then owners with different
    # versions would get unrelated maps. RandomState is frozen.
    seed = np.frombuffer(bytes.fromhex(digest), "<u4")
    tall = max(rows, columns), min(rows, columns)
    gaussian = np.random.RandomState(seed).standard_normal(tall)
    # Orthogonal columns are unique up to their signs, which depend on the LAPACK: a positive diagonal fixes them.
    orthonormal, triangular = np.linalg.qr(gaussian)
    orthonormal *= np.sign(np.diag(triangular))
    return orthonormal.T if rows <= columns else orthonormal
