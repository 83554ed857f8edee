"""Floating-point types that numpy lacks: values of them are kept as float32, rounded to what the type can hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8_e4m3": 1, "int32": 4}
"""Bytes of an element of a tensor."""

ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Half the distance between neighbours, relative to the lower of them; nothing is rounded from fp32 to fp32."""

_Floats = NDArray[np.float32]

E4M3_LARGEST = np.float32(448)
E2M1_LARGEST = np.float32(6)


def round_to(values: _Floats, dtype: str) -> _Floats:
    """``values`` rounded to nearest even of a type; ``fp8_e4m3`` saturates at 448, ``fp4_e2m1`` at 6."""
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
            return _round_short(values, E4M3_LARGEST, mantissa_bits=3, least_step=-9)
        case "fp4_e2m1":
            return _round_short(values, E2M1_LARGEST, mantissa_bits=1, least_step=-1)
        case _:
            raise ValueError(f"no rounding to {dtype!r}")


def _round_short(values: _Floats, largest: np.float32, *, mantissa_bits: int, least_step: int) -> _Floats:
    """Steps of 2^(e - mantissa_bits) for numbers with exponent e, of 2^least_step below the normal ones."""
    clipped = np.clip(values, -largest, largest)
    _, exponent = np.frexp(clipped)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1 - mantissa_bits, least_step)).astype(np.float32)
    rounded: _Floats = np.rint(clipped / step) * step
    return rounded


def e4m3_bits(values: _Floats) -> NDArray[np.uint8]:
    """Codes of ``values``, which :func:`round_to` made; NaN keeps no sign."""
    codes = np.arange(0x7F, dtype=np.uint8)
    exponent, mantissa = codes >> 3, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7)
    magnitudes = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    found = np.searchsorted(magnitudes, np.abs(values)).astype(np.uint8)  # NaN sorts last: 0x7F
    bits: NDArray[np.uint8] = found | np.where(values < 0, 0x80, 0).astype(np.uint8)
    return bits


def e2m1_bits(values: _Floats) -> NDArray[np.uint8]:
    """Codes of ``values``, which :func:`round_to` made: the sign in the highest of four bits."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    found = np.searchsorted(magnitudes, np.abs(values)).astype(np.uint8)
    bits: NDArray[np.uint8] = found | np.where(values < 0, 8, 0).astype(np.uint8)
    return bits
