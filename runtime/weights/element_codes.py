"""Elements of few bits and the scales of their groups, on torch tensors of any device.

The twin of quantising.py and of codegen/numbers/dtypes.py, which define the bits: the same operations of fp32 in the
same order, one at a time. Codes and bits are int32, for torch does little with other integers on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

TOO_LARGE: Final = 2.0**126
"""From here on, weights are refused like infinities: no sum or scale may overflow."""

_TINY: Final = 2.0**-100
_RANGES = ((1.0, 1.0), (0.9, 1.0), (1.0, 0.9), (0.9, 0.9))
"""Shares of the least and the largest weight of a group between which int4 elements are tried to lie."""
_E4M3_TOP_EXPONENT: Final = 8
"""Of 448, the largest number of e4m3."""
_LANES: Final = 4
"""Partial sums of squared errors, in whose order the twins add them."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Codes = tuple[Tensor, Tensor]
"""Of elements [n, groups, group], and the bits of the scale of each group [n, groups]."""


def encode(groups: Tensor, dtype: str) -> Codes:
    """Codes of ``groups`` fp32 [n, groups, group] as elements of type ``dtype``, and the bits of their scales."""
    return _ENCODERS[dtype](groups)


def mxfp8_codes(groups: Tensor) -> Codes:
    """Codes and exponents of e4m3 elements times powers of two."""
    peak = groups.abs().amax(dim=2)
    exponent = ((peak.view(torch.int32) >> 23) - _E4M3_TOP_EXPONENT).clamp(min=1)
    return _e4m3_codes(groups / (exponent << 23).view(torch.float32).unsqueeze(2)), exponent


def nvfp4_codes(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [parts, groups, 16], bits of the e4m3 scales [parts, groups], fp32 scales of scales [parts]."""
    peaks = groups.abs().amax(dim=2)
    peak = peaks.amax(dim=1)
    one = _number(1.0, groups)
    outer = torch.where(peak >= _TINY, peak, one) * _number(1 / (6 * 448), groups)
    bits = _e4m3_codes(peaks / (outer * _number(6.0, groups)).unsqueeze(1))
    steps = e4m3_values(bits) * outer.unsqueeze(1)
    inverse = torch.where(steps > 0, one / torch.where(steps > 0, steps, one), 0.0)
    codes = _e2m1_codes(groups * inverse.unsqueeze(2))
    return torch.where(codes == 8, 0, codes), bits, outer


def e4m3_values(codes: Tensor) -> Tensor:
    """fp32 numbers that are the codes of e4m3, int32 from 0 to 255 and none of them NaN."""
    magnitude = ((codes & 0x7F) << 20).view(torch.float32) * 2.0**120
    return torch.where(codes >= 0x80, -magnitude, magnitude)


def _number(value: float, like: Tensor) -> Tensor:
    """A tensor of one fp32: torch divides by it, and not by way of a reciprocal."""
    return torch.full((1,), value, dtype=torch.float32, device=like.device)


def _symmetric(groups: Tensor, top: float) -> Codes:
    """Weights divided by their group's scale, of magnitude ``top`` at most, and the bits of the scales."""
    most = groups.abs().amax(dim=2)
    largest = _number(top, groups)
    zero = most < _TINY
    nonzero = torch.where(zero, 1.0, most)
    inverse = torch.where(zero, 0.0, largest / nonzero)
    scale = torch.where(zero, 0.0, nonzero / largest)
    return groups * inverse.unsqueeze(2), scale.view(torch.int32)


def _int8(groups: Tensor) -> Codes:
    values, scales = _symmetric(groups, 127.0)
    return torch.round(values).to(torch.int32) & 0xFF, scales


def _fp8_e4m3(groups: Tensor) -> Codes:
    values, scales = _symmetric(groups, 448.0)
    return _e4m3_codes(values), scales


def _e4m3_codes(values: Tensor) -> Tensor:
    """Codes of the nearest numbers of e4m3, even ones among two, 448 at the most; zeros have no sign."""
    values = values.clamp(-448.0, 448.0)
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # Of the fp32, four bits of exponent and three of mantissa are kept; below 2^-6 there are steps of 2^-9.
    kept = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = torch.round(values.abs() * 512.0).clamp(max=8.0).to(torch.int32)
    codes = torch.where(magnitude < 0x3C800000, subnormal, kept)
    return torch.where(codes == 0, codes, codes | ((bits >> 24) & 0x80))


def _int4(groups: Tensor) -> Codes:
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    one, fifteen = _number(1.0, groups), _number(15.0, groups)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for low_share, high_share in _RANGES:
        first, last = low * _number(low_share, groups), high * _number(high_share, groups)
        scale = _rounded_bf16((last - first) / fifteen)
        scale = torch.where(scale < _TINY, 0.0, scale)
        inverse = torch.where(scale == 0, 0.0, one / torch.where(scale == 0, 1.0, scale))
        eighth = scale * 8.0
        offset = _rounded_bf16(first + eighth)
        elements = torch.round((groups - offset.unsqueeze(2)) * inverse.unsqueeze(2)).clamp(-8.0, 7.0)
        product = elements * scale.unsqueeze(2)
        error = _sum_of_squares((product + offset.unsqueeze(2)) - groups)
        codes = elements.to(torch.int32) & 0xF
        pair = offset.view(torch.int32) | ((scale.view(torch.int32) >> 16) & 0xFFFF)
        if best is None:
            best = error, codes, pair
            continue
        better = error < best[0]
        best = (
            torch.where(better, error, best[0]),
            torch.where(better.unsqueeze(2), codes, best[1]),
            torch.where(better, pair, best[2]),
        )
    assert best is not None
    return best[1], best[2]


def _rounded_bf16(values: Tensor) -> Tensor:
    bits = values.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def _sum_of_squares(errors: Tensor) -> Tensor:
    """Over the last axis, in the order of the twins."""
    n, groups, group = errors.shape
    lanes = torch.zeros((n, groups, _LANES), dtype=torch.float32, device=errors.device)
    for step in range(0, group, _LANES):
        each = errors[:, :, step : step + _LANES]
        squares = each * each
        lanes = lanes + squares
    return (lanes[:, :, 0] + lanes[:, :, 1]) + (lanes[:, :, 2] + lanes[:, :, 3])


def _fp4_e2m1(groups: Tensor) -> Codes:
    # The largest element, 6, has the exponent 2.
    most = groups.abs().amax(dim=2).view(torch.int32) >> 23
    exponent = (most - 2).clamp(min=1)
    inverse = ((254 - exponent) << 23).view(torch.float32)
    return _e2m1_codes(groups * inverse.unsqueeze(2)), exponent


def _e2m1_codes(values: Tensor) -> Tensor:
    """Codes of the nearest numbers of e2m1, even codes among two, 6 at the most; a zero may have a sign."""
    a = values.abs()
    codes = torch.zeros(a.shape, dtype=torch.int32, device=a.device)
    # Halfway between two elements, the one with an even code is taken.
    for passed in (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0):
        codes = codes + passed.to(torch.int32)
    return codes | ((values.view(torch.int32) >> 28) & 8)


def _signed(bits: int) -> Callable[[Tensor], Tensor]:
    return lambda codes: ((codes << (32 - bits)) >> (32 - bits)).float()


def _e2m1_values(codes: Tensor) -> Tensor:
    numbers = [*_E2M1, *(-value for value in _E2M1)]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").to(codes.device)[codes]


_ENCODERS: dict[str, Callable[[Tensor], Codes]] = {
    "int8": _int8,
    "fp8_e4m3": _fp8_e4m3,
    "int4": _int4,
    "fp4_e2m1": _fp4_e2m1,
}
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": _signed(8),
    "int4": _signed(4),
    "fp8_e4m3": e4m3_values,
    "fp4_e2m1": _e2m1_values,
}
"""fp32 numbers that are the codes (int32) of each type of elements."""
