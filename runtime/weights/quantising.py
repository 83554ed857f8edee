"""Weights into elements of few bits and their scales (codegen/numbers/precisions.py), on numpy arrays.

The twin of runtime/native/quantise.c, and the definition of its bits: every step is one fp32 operation in the same
order. A zero is what a group becomes whose largest weight is below 2^-100.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.numbers.precisions import Precision

TOO_LARGE = np.float32(2.0**126)
"""From here on, weights are refused like infinities: no sum or scale may overflow."""

_TINY = np.float32(2.0**-100)
_LARGEST = {"int8": np.float32(127), "fp8_e4m3": np.float32(448)}
_RANGES = ((1.0, 1.0), (0.9, 1.0), (1.0, 0.9), (0.9, 0.9))
"""Shares of the least and the largest weight of a group between which int4 elements are tried to lie."""
_LANES = 4
"""Partial sums of squared errors, in whose order the C twin adds them."""

_Floats = NDArray[np.float32]
_Words = NDArray[np.uint32]


def quantisable(weights: _Floats) -> bool:
    """Whether all weights are finite and below 2^126."""
    return weights.size == 0 or bool((np.abs(weights) < TOO_LARGE).all())


def quantise(weights: _Floats, precision: Precision) -> _Words:
    """Words [n, rows] of ``weights`` [n, k], all of which are :func:`quantisable`; row by row as a panel holds them."""
    n, k = weights.shape
    group, groups, rows = precision.group(k), precision.groups(k), precision.group_rows(k)
    codes, scales = encode(np.ascontiguousarray(weights).reshape(n, groups, group), precision.dtype)
    padded = np.zeros((n, groups, rows * precision.steps), np.uint32)
    padded[:, :, :group] = codes
    shifts = np.arange(precision.steps, dtype=np.uint32) * np.uint32(precision.bits)
    words: _Words = np.bitwise_or.reduce(padded.reshape(n, groups, rows, precision.steps) << shifts, axis=3)
    if precision.scales is None:
        return words.reshape(n, groups * rows)
    per_row = precision.scales.per_word
    out = np.zeros((n, precision.rows(k)), np.uint32)
    for first in range(0, groups, per_row):
        at = first // per_row + first * rows
        here = min(per_row, groups - first)
        for place in range(here):
            out[:, at] |= scales[:, first + place] << np.uint32(32 // per_row * place)
        out[:, at + 1 : at + 1 + here * rows] = words[:, first : first + here].reshape(n, here * rows)
    return out


def encode(groups: _Floats, dtype: str) -> tuple[_Words, _Words]:
    """Codes [n, groups, group] of elements of type ``dtype``, and the bits of the scale of each group [n, groups]."""
    return _ENCODERS[dtype](groups)


def _nearest_bf16(bits: _Words) -> _Words:
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


def _rounded_bf16(values: _Floats) -> _Floats:
    return _nearest_bf16(values.view(np.uint32)).view(np.float32)


def _bf16(groups: _Floats) -> tuple[_Words, _Words]:
    return _nearest_bf16(groups.view(np.uint32)) >> np.uint32(16), np.zeros(0, np.uint32)


def _symmetric(groups: _Floats, top: np.float32) -> tuple[_Floats, _Words]:
    """Weights divided by their group's scale, of magnitude ``top`` at most, and the bits of the scales."""
    most = np.abs(groups).max(axis=2)
    zero = most < _TINY
    nonzero = np.where(zero, np.float32(1), most)
    inverse = np.where(zero, np.float32(0), top / nonzero)
    scale = np.where(zero, np.float32(0), nonzero / top)
    return groups * inverse[:, :, None], scale.view(np.uint32)


def _int8(groups: _Floats) -> tuple[_Words, _Words]:
    values, scales = _symmetric(groups, _LARGEST["int8"])
    return np.rint(values).astype(np.int32).view(np.uint32) & np.uint32(0xFF), scales


def _fp8_e4m3(groups: _Floats) -> tuple[_Words, _Words]:
    values, scales = _symmetric(groups, _LARGEST["fp8_e4m3"])
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Of the fp32, four bits of exponent and three of mantissa are kept; below 2^-6 there are steps of 2^-9.
    kept = (magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    subnormal = np.rint(np.minimum(np.abs(values) * np.float32(512), np.float32(8))).astype(np.uint32)
    codes = np.where(magnitude < np.uint32(0x3C800000), subnormal, kept - np.uint32(120 << 3))
    # Zeros have no sign: AMD's e4m3 has NaN where -0 would be.
    return np.where(codes == 0, codes, codes | ((bits >> np.uint32(24)) & np.uint32(0x80))), scales


def _int4(groups: _Floats) -> tuple[_Words, _Words]:
    low, high = groups.min(axis=2), groups.max(axis=2)
    best_error, best_codes, best_pair = None, None, None
    for low_share, high_share in _RANGES:
        first, last = low * np.float32(low_share), high * np.float32(high_share)
        scale = _rounded_bf16((last - first) / np.float32(15))
        scale = np.where(scale < _TINY, np.float32(0), scale)
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / np.where(scale == 0, np.float32(1), scale))
        offset = _rounded_bf16(first + np.float32(8) * scale)
        values = np.rint((groups - offset[:, :, None]) * inverse[:, :, None])
        elements = np.clip(values, np.float32(-8), np.float32(7))
        errors = (scale[:, :, None] * elements + offset[:, :, None]) - groups
        error = _sum_of_squares(errors)
        codes = elements.astype(np.int32).view(np.uint32) & np.uint32(0xF)
        pair = offset.view(np.uint32) | (scale.view(np.uint32) >> np.uint32(16))
        if best_error is None or best_codes is None or best_pair is None:
            best_error, best_codes, best_pair = error, codes, pair
        else:
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_codes = np.where(better[:, :, None], codes, best_codes)
            best_pair = np.where(better, pair, best_pair)
    assert best_codes is not None
    assert best_pair is not None
    return best_codes, best_pair


def _sum_of_squares(errors: _Floats) -> _Floats:
    """Over the last axis, in the order of the C twin."""
    n, groups, group = errors.shape
    lanes = np.zeros((n, groups, _LANES), np.float32)
    with np.errstate(over="ignore"):  # an infinite error is never less than another
        for step in range(0, group, _LANES):
            each = errors[:, :, step : step + _LANES]
            lanes += each * each
    return (lanes[:, :, 0] + lanes[:, :, 1]) + (lanes[:, :, 2] + lanes[:, :, 3])


def _fp4_e2m1(groups: _Floats) -> tuple[_Words, _Words]:
    # The largest element, 6, has the exponent 2.
    most = (np.abs(groups).max(axis=2).view(np.uint32) >> np.uint32(23)).astype(np.int32)
    exponent = np.maximum(most - 2, 1).astype(np.uint32)
    inverse = ((np.uint32(254) - exponent) << np.uint32(23)).view(np.float32)
    values = groups * inverse[:, :, None]
    a = np.abs(values)
    codes = np.zeros(a.shape, np.uint32)
    # Halfway between two elements, the one with an even code is taken.
    for passed in (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0):
        codes += passed
    return codes | ((values.view(np.uint32) >> np.uint32(28)) & np.uint32(8)), exponent


_ENCODERS: dict[str, Callable[[_Floats], tuple[_Words, _Words]]] = {
    "bf16": _bf16,
    "int8": _int8,
    "fp8_e4m3": _fp8_e4m3,
    "int4": _int4,
    "fp4_e2m1": _fp4_e2m1,
}
