"""Weights into a :class:`RowLayout`, as GPU kernels read them, on numpy arrays; and what they are worth there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.numbers.activation_rounding import E4M3_TOP_EXPONENT
from tilewright.codegen.numbers.dtypes import (
    e2m1_bits,
    e2m1_values,
    e4m3_bits,
    e4m3_values,
    e8m0_values,
    round_to,
    to_bytes,
)
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.numbers.nvfp4 import nvfp4_parts
from tilewright.codegen.numbers.precisions import Precision
from tilewright.errors import TilewrightError
from tilewright.runtime.weights.quantising import encode, quantisable

_Floats = NDArray[np.float32]
_Words = NDArray[np.uint32]
_Bytes = NDArray[np.uint8]

_RUN = 16
"""Steps of k whose elements lie in the lower halves of consecutive bytes; the next so many lie in the upper ones."""


def pack_rows(weight: _Floats, layout: RowLayout) -> _Bytes:
    """Bytes of ``weight`` [experts, n, k], elements and then scales.

    Raises:
        TilewrightError: when the layout's groups do not divide k, or the weight holds NaN, infinities or values beyond
            2^126.

    """
    experts, n, k = weight.shape
    packed = np.zeros(layout.packed_bytes(experts, n, k), np.uint8)
    element_bytes = layout.element_bytes(experts, n, k)
    if layout.stored.scales is None:
        packed[:] = np.frombuffer(to_bytes(weight, layout.precision), np.uint8)
        return packed
    codes, scales, outer = _codes_and_scales(weight, layout.stored)
    packed[:element_bytes] = _element_bytes(codes, layout)
    if layout.stored.scales.granularity == "group" and not layout.stored.scaled_by_matrix_unit:
        scales = scales.transpose(0, 2, 1)
    flat = np.ascontiguousarray(scales)
    as_bytes = flat.astype(np.uint8) if layout.stored.scales.itemsize == 1 else flat.view(np.uint8)
    begin = layout.scale_offset(experts, n, k)
    packed[begin : begin + as_bytes.size] = as_bytes.reshape(-1)
    if outer.size:
        packed[layout.outer_offset(experts, n, k) :] = outer.view(np.uint8)
    return packed


def round_rows(weight: _Floats, precision: Precision, dtype: str) -> _Floats:
    """``weight`` [experts, n, k] with the values that GPU kernels compute with; the signature's weights are ``dtype``.

    Where a kernel multiplies elements and scales before the product, the result is rounded to ``dtype`` once more;
    where scales wait until after it (a row, a tensor, a block), or the matrix unit multiplies them, it is not. Elements
    of nvfp4 times their scales are numbers of bf16 and fp16 anyway.

    Raises:
        TilewrightError: as :func:`pack_rows` does.

    """
    if precision.scales is None:
        return round_to(weight, precision.dtype)
    codes, scales, outer = _codes_and_scales(weight, precision)
    elements = _VALUES[precision.dtype](codes)
    experts, n, k = weight.shape
    if precision.scales.granularity == "block":
        size = precision.scales.group
        factors = scales.view(np.float32).repeat(size, axis=1)[:, :k].repeat(size, axis=2)[:, :, :n]
        return elements * factors.transpose(0, 2, 1)
    if precision.scales.granularity in ("tensor", "channel"):
        return elements * scales.view(np.float32).reshape(experts, -1, 1)
    spread = scales.repeat(precision.group(k), axis=2)
    match precision.scales.dtype:
        case "bf16_pair":
            factors, offsets = (spread << 16).view(np.float32), (spread & np.uint32(0xFFFF0000)).view(np.float32)
            return round_to(elements * factors + offsets, dtype)
        case "e8m0":
            exact = elements * e8m0_values(spread)
            return exact if precision.scaled_by_matrix_unit else round_to(exact, dtype)
        case "e4m3":
            return elements * e4m3_values(spread) * outer[:, None, None]
        case _:
            return round_to(elements * spread.view(np.float32), dtype)


def _codes_and_scales(weight: _Floats, precision: Precision) -> tuple[_Words, _Words, _Floats]:
    """Codes [experts, n, k], bits of the scales (as ``RowLayout`` has them), scales of scales ([experts] or empty)."""
    experts, n, k = weight.shape
    scales = precision.scales
    assert scales is not None
    if refusal := precision.refusal(k):
        raise TilewrightError(refusal)
    if not quantisable(weight):
        raise TilewrightError(
            f"weights with NaN, infinities or values beyond 2^126 cannot be stored in {precision.name}; "
            "leave that precision out"
        )
    if scales.outer:
        elements, factors, outer = nvfp4_parts(weight.reshape(experts, n * k // scales.group, scales.group))
        codes, bits = e2m1_bits(elements).astype(np.uint32), e4m3_bits(factors).astype(np.uint32)
        return codes.reshape(weight.shape), bits.reshape(experts, n, k // scales.group), outer
    none = np.zeros(0, np.float32)
    match scales.granularity:
        case "tensor":
            codes, bits = encode(weight.reshape(experts, 1, n * k), precision.dtype)
            return codes.reshape(weight.shape), bits.reshape(experts), none
        case "block":
            size = scales.group
            rows = -(-n // size) * size
            padded = np.zeros((experts, rows, k), np.float32)
            padded[:, :n] = weight
            blocks = padded.reshape(experts, rows // size, size, k // size, size).transpose(0, 3, 1, 2, 4)
            codes, bits = encode(blocks.reshape(experts * (k // size), rows // size, size * size), precision.dtype)
            back = codes.reshape(blocks.shape).transpose(0, 2, 3, 1, 4).reshape(padded.shape)
            return back[:, :n], bits.reshape(experts, k // size, rows // size), none
        case _:
            group = precision.group(k)
            grouped = weight.reshape(experts * n, k // group, group)
            is_mxfp8 = precision.dtype == "fp8_e4m3" and scales.dtype == "e8m0"
            codes, bits = _mxfp8(grouped) if is_mxfp8 else encode(grouped, precision.dtype)
            return codes.reshape(weight.shape), bits.reshape(experts, n, k // group), none


def _mxfp8(groups: _Floats) -> tuple[_Words, _Words]:
    """Codes and exponents of e4m3 elements times powers of two, as kernels make them of activations."""
    peak = np.abs(groups).max(axis=2, keepdims=True)
    exponent = np.maximum((peak.view(np.uint32) >> 23).astype(np.int32) - E4M3_TOP_EXPONENT, 1).astype(np.uint32)
    codes = e4m3_bits(round_to(groups / (exponent << 23).view(np.float32), "fp8_e4m3"))
    return codes.astype(np.uint32), exponent[:, :, 0]


def _element_bytes(codes: _Words, layout: RowLayout) -> _Bytes:
    elements = codes.astype(np.uint8)
    match layout.nibbles:
        case "runs":
            runs = elements.reshape(-1, 2, _RUN)
            return np.asarray(runs[:, 0] | (runs[:, 1] << np.uint8(4)), np.uint8).reshape(-1)
        case "pairs":
            pairs = elements.reshape(-1, 2)
            return np.asarray(pairs[:, 0] | (pairs[:, 1] << np.uint8(4)), np.uint8)
        case _:
            return elements.reshape(-1)


def _signed(bits: int) -> Callable[[_Words], _Floats]:
    return lambda codes: ((codes.view(np.int32) << (32 - bits)) >> (32 - bits)).astype(np.float32)


_VALUES: dict[str, Callable[[_Words], _Floats]] = {
    "int8": _signed(8),
    "int4": _signed(4),
    "fp8_e4m3": e4m3_values,
    "fp4_e2m1": e2m1_values,
}
