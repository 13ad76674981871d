import subprocess
import sys

import numpy as np
import pytest

from flexolmo_megatron.domain.projection import orthogonal_projection

DIGEST = "0123456789abcdef" * 4
EXPECTED = [-0.18684066090999862, 0.15986948244169202, -0.13913308085634107, -0.010468400527894089]


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32), (1, 8), (8, 1)])
def test_orthonormal(shape):
    matrix = orthogonal_projection(*shape, DIGEST)
    assert matrix.shape == shape and matrix.dtype == np.float64
    gram = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(gram, np.eye(min(shape)), atol=1e-12)


def test_up_projection_keeps_inner_products():
    a, b = np.random.default_rng(0).standard_normal((2, 24))
    matrix = orthogonal_projection(24, 64, DIGEST)
    assert (a @ matrix) @ (b @ matrix) == pytest.approx(a @ b, abs=1e-12)


def test_digest_decides():
    matrix = orthogonal_projection(24, 64, DIGEST)
    other = orthogonal_projection(24, 64, "f" + DIGEST[1:])
    assert np.abs(matrix - other).max() > 0.1
    # Guards the promise that owners with any versions of numpy get the same map.
    np.testing.assert_allclose(matrix[0, :4], EXPECTED, atol=1e-9)


def test_same_in_another_process():
    code = ("from flexolmo_megatron.domain.projection import orthogonal_projection;"
            f"print(orthogonal_projection(24, 64, {DIGEST!r}).tobytes().hex())")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    np.testing.assert_array_equal(np.frombuffer(bytes.fromhex(printed)).reshape(24, 64),
                                  orthogonal_projection(24, 64, DIGEST))
