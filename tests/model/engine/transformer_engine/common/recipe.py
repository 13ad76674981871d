"""The recipes' names and the fields that are read."""

from dataclasses import dataclass
from enum import Enum


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


@dataclass
class Recipe:
    fp8_format: Format = Format.HYBRID

    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)


@dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    override_linear_precision: tuple = (False, False, False)
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    params_dtype: object = None
    device: object = None


@dataclass
class Float8CurrentScaling(Recipe):
    fp8_quant_fwd_weight: QParams = QParams()
    fp8_dpa: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling(Recipe):
    fp8_format: Format = Format.E4M3
