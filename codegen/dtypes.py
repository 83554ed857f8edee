"""Floating-point types that numpy lacks: values of them are kept as float32, rounded to what the type can hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "int32": 4}
"""Bytes of an element of a tensor."""

_Floats = NDArray[np.float32]

E4M3_LARGEST = np.float32(448)


def round_to(values: _Floats, dtype: str) -> _Floats:
    """``values`` rounded to nearest even of ``fp32``, ``bf16``, ``fp16`` or ``fp8_e4m3`` (which saturates at 448)."""
    match dtype:
        case "fp32":
            return values
        case "bf16":
            bits = np.ascontiguousarray(values).view(np.uint32)
            nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
            return nearest.view(np.float32)
        case "fp16":
            return values.astype(np.float16).astype(np.float32)
        case "fp8_e4m3":
            return _round_e4m3(values)
        case _:
            raise ValueError(f"no rounding to {dtype!r}")


def _round_e4m3(values: _Floats) -> _Floats:
    """Steps of 2^(e - 3) for numbers with exponent e, of 2^-9 below 2^-6."""
    clipped = np.clip(values, -E4M3_LARGEST, E4M3_LARGEST)
    _, exponent = np.frexp(clipped)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 4, -9)).astype(np.float32)
    rounded: _Floats = np.rint(clipped / step) * step
    return rounded
