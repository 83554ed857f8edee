"""Floating-point types that numpy lacks: values of them are kept as float32, rounded to what the type can hold.

The types themselves are those of ml_dtypes. Ours on top: fp8_e4m3 and fp4_e2m1 saturate (ml_dtypes makes NaN of what is
too large for e4m3), a NaN stays one (e2m1 has none, so that ml_dtypes makes a zero of it), and codes of zeros and NaN
have no sign (AMD's e4m3 has its NaN where -0 would be).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

_NUMPY: dict[str, np.dtype[np.generic]] = {
    "fp32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "int32": np.dtype(np.int32),
}
ITEMSIZE = {name: dtype.itemsize for name, dtype in _NUMPY.items()}
"""Bytes of an element of a tensor."""

ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Half the distance between neighbours, relative to the lower of them; nothing is rounded from fp32 to fp32."""

_Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]

E4M3_LARGEST = np.float32(448)
E2M1_LARGEST = np.float32(6)


def round_to(values: _Floats, dtype: str) -> _Floats:
    """``values`` rounded to nearest even of a type; ``fp8_e4m3`` saturates at 448, ``fp4_e2m1`` at 6."""
    match dtype:
        case "fp32":
            return values
        case "bf16" | "fp16":
            with np.errstate(invalid="ignore"):  # a NaN of unusual bits is one all the same
                return values.astype(_NUMPY[dtype]).astype(np.float32)
        case "fp8_e4m3":
            return _e4m3(values).astype(np.float32)
        case "fp4_e2m1":
            with np.errstate(invalid="ignore"):
                rounded = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)  # saturates by itself
            return np.where(np.isnan(values), values, rounded)
        case _:
            raise ValueError(f"no rounding to {dtype!r}")


def e4m3_bits(values: _Floats) -> _Bytes:
    """Codes of ``values`` rounded as :func:`round_to` does; zeros and NaN have no sign."""
    bits = _e4m3(values).view(np.uint8)
    magnitudes = bits & np.uint8(0x7F)
    return np.where((magnitudes == 0) | (magnitudes == 0x7F), magnitudes, bits)


def e2m1_bits(values: _Floats) -> _Bytes:
    """Codes of ``values``, none of them NaN, rounded as :func:`round_to` does: the sign in the highest of four bits.

    Zeros have no sign.
    """
    bits = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return np.where(bits == 8, np.uint8(0), bits)


def e4m3_values(bits: NDArray[np.unsignedinteger]) -> _Floats:
    """Numbers that are the codes of e4m3 in ``bits``."""
    values: _Floats = bits.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values


def e2m1_values(bits: NDArray[np.unsignedinteger]) -> _Floats:
    """Numbers that are the codes of e2m1, below 16, in ``bits``."""
    values: _Floats = bits.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return values


def e8m0_values(bits: NDArray[np.unsignedinteger]) -> _Floats:
    """Powers of two that are the codes of e8m0, which is the exponent of a float32, in ``bits``."""
    values: _Floats = bits.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return values


def to_bytes(values: NDArray[np.generic], dtype: str) -> bytes:
    """Elements of a tensor as memory holds them; floats come as float32 and are rounded, anything else is as it is."""
    if values.dtype != np.float32 or dtype == "fp32":
        return np.ascontiguousarray(values).tobytes()
    floats = values.astype(np.float32, copy=False)
    return e4m3_bits(floats).tobytes() if dtype == "fp8_e4m3" else floats.astype(_NUMPY[dtype]).tobytes()


def from_bytes(data: bytes, dtype: str) -> NDArray[np.generic]:
    """What :func:`to_bytes` wrote, flat: int32 as it is, floats as float32."""
    values = np.frombuffer(data, _NUMPY[dtype])
    return values if dtype == "int32" else values.astype(np.float32, copy=False)


def _e4m3(values: _Floats) -> NDArray[np.generic]:
    with np.errstate(invalid="ignore"):
        return np.clip(values, -E4M3_LARGEST, E4M3_LARGEST).astype(ml_dtypes.float8_e4m3fn)
