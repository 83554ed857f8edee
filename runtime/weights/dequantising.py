"""Quantised weights back to fp32, on torch tensors: what kernels compute with, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilewright.codegen.numbers.precisions import Precision

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantise(words: Tensor, precision: Precision, k: int) -> Tensor:
    """Weights fp32 [n, k] of int32 words [n, rows], which hold columns of panels (codegen/numbers/layouts.py).

    Kernels may leave the multiplication by a scale to the sum over its group, so their sums round differently.
    """
    n, groups, group, rows = words.shape[0], precision.groups(k), precision.group(k), precision.group_rows(k)
    per_row = precision.scales.per_word if precision.scales else 0
    is_scale = torch.zeros(words.shape[1], dtype=torch.bool, device="cpu")
    if per_row:
        is_scale[:: 1 + per_row * rows] = True
    steps = torch.arange(precision.steps, dtype=torch.int32, device="cpu") * precision.bits
    codes = words[:, ~is_scale].reshape(n, groups, rows, 1) >> steps & (1 << precision.bits) - 1
    elements = _ELEMENTS[precision.dtype](codes.reshape(n, groups, -1)[:, :, :group])
    if precision.scales is None:
        return elements.reshape(n, k)
    places = torch.arange(per_row, dtype=torch.int32, device="cpu") * (32 // per_row)
    fields = (words[:, is_scale].unsqueeze(2) >> places).reshape(n, -1)[:, :groups].unsqueeze(2)
    match precision.scales.dtype:
        case "fp32":
            weights = elements * fields.contiguous().view(torch.float32)
        case "bf16_pair":
            scale, offset = _upper(fields << 16), _upper(fields)
            weights = elements * scale + offset
        case _:  # e8m0
            weights = elements * ((fields & 0xFF) << 23).view(torch.float32)
    return weights.reshape(n, k)


def _upper(fields: Tensor) -> Tensor:
    """The bf16 numbers in the upper halves."""
    return (fields & -0x10000).view(torch.float32)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes << (32 - bits) >> (32 - bits)).float()


def _e4m3(codes: Tensor) -> Tensor:
    magnitude = ((codes & 0x7F) << 20).view(torch.float32) * 2.0**120
    return torch.where(codes >= 0x80, -magnitude, magnitude)


def _e2m1(codes: Tensor) -> Tensor:
    return torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32, device="cpu")[codes]


_ELEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda codes: (codes << 16).view(torch.float32),
    "int8": lambda codes: _signed(codes, 8),
    "fp8_e4m3": _e4m3,
    "int4": lambda codes: _signed(codes, 4),
    "fp4_e2m1": _e2m1,
}
