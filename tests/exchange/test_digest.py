import hashlib

import pytest
import torch

from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import BackgroundDigest, digest_tensors, model_digest


def lazy(value: torch.Tensor) -> LazyTensor:
    return LazyTensor(value.dtype, tuple(value.shape), value.clone)


def test_byte_layout_is_the_documented_one():
    scalar, matrix = torch.tensor(1.5), torch.arange(6).reshape(2, 3).to(torch.bfloat16)
    expected = hashlib.sha256()
    expected.update(b"a\0BF16\x002,3\0")
    for value in range(6):
        expected.update((torch.tensor(float(value)).view(torch.int32).item() >> 16).to_bytes(2, "little"))
    expected.update(b"b\0F32\0\0" + b"\x00\x00\xc0\x3f")
    model = LazyModel(None, {"b": lazy(scalar), "a": lazy(matrix)})
    assert model_digest(model) == expected.hexdigest()


def test_does_not_depend_on_chunks_or_on_the_order_of_the_table(anchor):
    backwards = LazyModel(anchor.card, dict(reversed(anchor.tensors.items())))
    assert model_digest(backwards) == model_digest(anchor)
    whole = digest_tensors([("a", "F32", (2,), [b"12345678"])])
    assert digest_tensors([("a", "F32", (2,), [b"123", b"", b"45678"])]) == whole


@pytest.mark.parametrize("change", [
    lambda name, value: ("other", value),
    lambda name, value: (name, value.reshape(-1)),
    lambda name, value: (name, value.view(torch.float16)),
    lambda name, value: (name, torch.where(torch.arange(value.numel()).reshape(value.shape) == 0, value + 1, value)),
])
def test_depends_on_name_shape_dtype_and_bytes(anchor, digest, change):
    name = "lm_head.weight"
    tensors = dict(anchor.tensors)
    new_name, value = change(name, tensors.pop(name).read())
    tensors[new_name] = lazy(value)
    assert model_digest(LazyModel(anchor.card, tensors)) != digest


def test_progress_adds_up_to_the_bytes(anchor):
    counts = []
    model_digest(anchor, counts.append)
    assert sum(counts) == sum(tensor.read().nbytes for tensor in anchor.tensors.values())


@pytest.mark.parametrize(("tensors", "message"), [
    ([("b", "F32", (), [b"1234"]), ("a", "F32", (), [b"1234"])], "tensor 'a' after 'b'"),
    ([("a", "F32", (), [b"1234"]), ("a", "F32", (), [b"1234"])], "unique names in ascending order"),
    ([("a", "F32", (2,), [b"1234"])], "has 4 bytes, but its dtype and shape need 8"),
])
def test_refuses_what_has_no_digest(tensors, message):
    with pytest.raises(FlexOlmoError, match=message):
        digest_tensors(tensors)


def test_background_digest(anchor, digest):
    assert BackgroundDigest(anchor).result() == digest

    def broken():
        raise FlexOlmoError("gone")

    with pytest.raises(FlexOlmoError, match="gone"):
        BackgroundDigest(LazyModel(anchor.card, {"a": LazyTensor(torch.float32, (1,), broken)})).result()
