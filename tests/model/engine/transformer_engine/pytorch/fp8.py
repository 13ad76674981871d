from transformer_engine.pytorch.quantization import FP8GlobalStateManager, fp8_autocast  # noqa: F401
