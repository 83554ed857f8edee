"""What kernels make of activations in precisions that round them to eight bits or four before the product."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.numbers.dtypes import E4M3_LARGEST, round_to
from tilewright.codegen.numbers.nvfp4 import nvfp4_parts
from tilewright.codegen.numbers.precisions import Precision

_Floats = NDArray[np.float32]

E4M3_TOP_EXPONENT = 8
"""Of 448, the largest number."""
_INT8_LARGEST = np.float32(127)
_INT8_TINY = np.float32(2.0**-100)
"""Rows without a larger value count as zeros."""


def round_activations(x: _Floats, precision: Precision) -> _Floats:
    """``x`` [rows, k] with the values that the product gets: elements times their scales (``precision.x_scales``)."""
    if precision.x_scales is None:
        return x
    rows, k = x.shape
    match precision.x_scales.granularity:
        case "tensor":
            grouped = x.reshape(1, 1, rows * k)
        case "channel":
            grouped = x.reshape(rows, 1, k)
        case _:
            grouped = x.reshape(rows, k // precision.x_scales.group, precision.x_scales.group)
    if not x.size:
        return x
    if precision.x_scales.dtype == "e4m3":
        elements, scales, outer = nvfp4_parts(grouped)
        return (elements * (scales * outer[:, None])[:, :, None]).reshape(rows, k)
    peak = np.abs(grouped).max(axis=2, keepdims=True)
    if precision.x_dtype == "int8":
        return _round_int8(grouped, peak).reshape(rows, k)
    if precision.x_scales.dtype == "e8m0":
        exponent = np.maximum((peak.view(np.uint32) >> 23).astype(np.int32) - E4M3_TOP_EXPONENT, 1)
        scale = (exponent.astype(np.uint32) << 23).view(np.float32)
    else:
        scale = np.where(peak > 0, peak, np.float32(1)) * np.float32(1 / E4M3_LARGEST)
    rounded: _Floats = round_to(grouped / scale, precision.x_dtype) * scale
    return rounded.reshape(rows, k)


def _round_int8(grouped: _Floats, peak: _Floats) -> _Floats:
    """Every step is the fp32 operation that kernels do (``moe_gemm/cpu_integer``), so that elements are the same."""
    zero = peak < _INT8_TINY
    largest = np.where(zero, np.float32(1), peak)
    scale = np.where(zero, np.float32(0), largest / _INT8_LARGEST)
    rounded: _Floats = np.rint(grouped * (_INT8_LARGEST / largest)) * scale
    return rounded
