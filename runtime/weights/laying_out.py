"""Weights [experts, n, k] in the layout of a kernel, whichever kind that is, and expert by expert out of it again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.runtime.calls.bind import pack_weight
from tilewright.runtime.calls.binding import TORCH_DTYPES
from tilewright.runtime.weights.experts import DeclaredWeights, ExpertWeights, PackedWeights, RowWeights
from tilewright.runtime.weights.packing import packed_shape
from tilewright.runtime.weights.rows_on_device import pack_rows_on_device

Shape = tuple[int, int, int]


def laid_out_elements(layout: WeightLayout | RowLayout, shape: Shape) -> int:
    """Elements of 32 bits (panels) or bytes (rows) that a weight takes in ``layout``.

    Raises:
        TilewrightError: when the layout is impossible, or does not fit these weights.

    """
    if isinstance(layout, RowLayout):
        return layout.packed_bytes(*shape)
    return math.prod(packed_shape(layout, shape))


def lay_out(weight: Tensor, layout: WeightLayout | RowLayout) -> Tensor:
    """``weight`` as a kernel reads it: the bits of ``layout`` as elements of the weight's dtype.

    Raises:
        TilewrightError: when the layout does not fit, or the weight is to be quantised and holds NaN or infinity.

    """
    if isinstance(layout, RowLayout):
        return pack_rows_on_device(weight, layout).view(weight.dtype)
    return pack_weight(weight, layout).view(torch.float32)


def laid_out_weights(laid_out: Tensor, layout: WeightLayout | RowLayout, shape: Shape) -> ExpertWeights:
    """Expert by expert what :func:`lay_out` made of a weight ``shape``."""
    if isinstance(layout, RowLayout):
        if TORCH_DTYPES.get(layout.precision) is laid_out.dtype:  # stored as declared
            return DeclaredWeights(laid_out.view(-1)[: math.prod(shape)].view(shape))
        return RowWeights(laid_out, layout, shape)
    words = torch.int32 if layout.stored.quantised else torch.float32
    return PackedWeights(laid_out.view(words), layout, shape[1], shape[2])
