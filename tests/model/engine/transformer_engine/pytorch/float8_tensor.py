from transformer_engine.pytorch.tensor import QuantizedTensor as Float8Tensor  # noqa: F401
