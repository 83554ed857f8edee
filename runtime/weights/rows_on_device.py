"""Weights into a :class:`RowLayout` and back on torch tensors, on the device where they lie.

The twin of row_packing.py, which defines the bits. Every step is one operation of fp32 or of integers, in the same
order as there: nothing that a device's compiler could contract, and no division by a Python number, in whose place
torch multiplies by the reciprocal on GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.numbers.precisions import Precision
from tilewright.errors import TilewrightError
from tilewright.runtime.weights.element_codes import TOO_LARGE, e4m3_values, encode, mxfp8_codes, nvfp4_codes
from tilewright.runtime.weights.element_codes import VALUES as ELEMENT_VALUES

_RUN = 16
"""Steps of k whose elements lie in the lower halves of consecutive bytes; the next so many lie in the upper ones."""
_AT_ONCE = 1 << 24
"""Weights that are packed at once, in experts: what is needed beside them is ten times as large."""
_UNIT = 16
"""Bytes that packed weights are a multiple of, so that they can be seen as elements of any dtype."""
_STORED_AS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pack_rows_on_device(weight: Tensor, layout: RowLayout) -> Tensor:
    """Bytes of ``weight`` [experts, n, k] (fp32, bf16 or fp16) as uint8: elements, then scales, zeros at the end.

    Weights that are stored in their own dtype are not copied where they are contiguous.

    Raises:
        TilewrightError: when the layout's groups do not divide k, or the weight holds NaN, infinities or values beyond
            2^126.

    """
    experts, n, k = weight.shape
    stored = layout.stored
    if stored.scales is None:
        # To fp32 on the way: a weight of fp16 is rounded to bf16 once, as the twin does.
        same = weight.dtype is _STORED_AS[stored.dtype]
        elements = (weight if same else weight.float().to(_STORED_AS[stored.dtype])).contiguous()
        flat = elements.view(-1).view(torch.uint8)
        return flat if flat.numel() % _UNIT == 0 else torch.cat((flat, flat.new_zeros(-flat.numel() % _UNIT)))
    if refusal := stored.refusal(k):
        raise TilewrightError(refusal)
    nbytes = layout.packed_bytes(experts, n, k)
    packed = torch.zeros(-(-nbytes // _UNIT) * _UNIT, dtype=torch.uint8, device=weight.device)
    parts = _Parts(packed, layout, (experts, n, k))
    step = max(1, _AT_ONCE // (n * k))
    for first in range(0, experts, step):
        some = weight[first : first + step].float().contiguous()
        if not bool((some.abs() < TOO_LARGE).all()):
            raise TilewrightError(
                f"weights with NaN, infinities or values beyond 2^126 cannot be stored in {stored.name}; "
                "leave that precision out"
            )
        codes, scales, outer = _codes_and_scales(some, stored)
        parts.put(first, _element_bytes(codes, layout), _in_memory(scales, stored), outer)
    return packed


def unpack_rows(packed: Tensor, layout: RowLayout, shape: tuple[int, int, int], expert: int) -> Tensor:
    """fp32 [n, k] of one expert of a weight ``shape`` [experts, n, k]: elements times scales, not rounded again."""
    _, n, k = shape
    stored = layout.stored
    parts = _Parts(packed.view(-1).view(torch.uint8), layout, shape)
    if stored.scales is None:
        return parts.elements[expert].view(_STORED_AS[stored.dtype]).view(n, k).float()
    elements = ELEMENT_VALUES[stored.dtype](_codes_of(parts.elements[expert], layout, n, k))
    scales = parts.scales[expert]
    match stored.scales.granularity:
        case "tensor" | "channel":
            return elements * scales.view(torch.float32).view(-1, 1)
        case "block":
            size = stored.scales.group
            blocks = scales.view(torch.float32).view(-(-k // size), -(-n // size))
            spread = blocks.repeat_interleave(size, dim=0)[:k].repeat_interleave(size, dim=1)[:, :n]
            return elements * spread.T
        case _:
            groups, group = stored.groups(k), stored.group(k)
            grouped = elements.view(n, groups, group)
            return _times_groups(grouped, scales, parts.outer[expert : expert + 1], stored).reshape(n, k)


class _Parts:
    """Where the elements, scales and scales of scales of each expert lie in packed bytes."""

    def __init__(self, packed: Tensor, layout: RowLayout, shape: tuple[int, int, int]) -> None:
        experts = shape[0]
        element_bytes = layout.element_bytes(*shape)
        self.elements = packed[:element_bytes].view(experts, -1)
        scales = layout.stored.scales
        if scales is None:
            return
        count = 1
        for length in layout.scale_shape(*shape):
            count *= length
        begin = layout.scale_offset(*shape)
        self.scales = packed[begin : begin + scales.itemsize * count].view(experts, -1)
        self.outer = packed[:0].view(torch.float32)
        if scales.outer:
            begin = layout.outer_offset(*shape)
            self.outer = packed[begin : begin + 4 * experts].view(torch.float32)

    def put(self, first: int, elements: Tensor, scales: Tensor, outer: Tensor | None) -> None:
        """Write those of experts from ``first`` on, [experts, ...]."""
        experts = elements.shape[0]
        self.elements[first : first + experts] = elements
        self.scales[first : first + experts] = scales.reshape(experts, -1)
        if outer is not None:
            self.outer[first : first + experts] = outer


def _codes_and_scales(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int32 [experts, n, k], bits of the scales int32 (as ``RowLayout`` has them), scales of scales or None."""
    experts, n, k = weight.shape
    scales = precision.scales
    assert scales is not None
    if scales.outer:
        codes, bits, outer = nvfp4_codes(weight.view(experts, -1, scales.group))
        return codes.view(weight.shape), bits.view(experts, n, -1), outer
    match scales.granularity:
        case "tensor":
            codes, bits = encode(weight.view(experts, 1, n * k), precision.dtype)
            return codes.view(weight.shape), bits.view(experts), None
        case "block":
            size = scales.group
            rows = -(-n // size) * size
            padded = torch.zeros((experts, rows, k), dtype=torch.float32, device=weight.device)
            padded[:, :n] = weight
            blocks = padded.view(experts, rows // size, size, k // size, size).permute(0, 3, 1, 2, 4)
            codes, bits = encode(blocks.reshape(experts * (k // size), rows // size, size * size), precision.dtype)
            back = codes.view(blocks.shape).permute(0, 2, 3, 1, 4).reshape(padded.shape)
            return back[:, :n], bits.view(experts, k // size, rows // size), None
        case _:
            group = precision.group(k)
            grouped = weight.view(experts * n, k // group, group)
            is_mxfp8 = precision.dtype == "fp8_e4m3" and scales.dtype == "e8m0"
            codes, bits = mxfp8_codes(grouped) if is_mxfp8 else encode(grouped, precision.dtype)
            return codes.view(weight.shape), bits.view(experts, n, k // group), None


def _element_bytes(codes: Tensor, layout: RowLayout) -> Tensor:
    """uint8 [experts, bytes]."""
    elements = codes.to(torch.uint8)
    experts = elements.shape[0]
    match layout.nibbles:
        case "runs":
            runs = elements.reshape(experts, -1, 2, _RUN)
            return (runs[:, :, 0] | (runs[:, :, 1] << 4)).reshape(experts, -1)
        case "pairs":
            pairs = elements.reshape(experts, -1, 2)
            return pairs[:, :, 0] | (pairs[:, :, 1] << 4)
        case _:
            return elements.reshape(experts, -1)


def _codes_of(elements: Tensor, layout: RowLayout, n: int, k: int) -> Tensor:
    """int32 [n, k] of the bytes of one expert."""
    match layout.nibbles:
        case "runs":
            in_bytes = elements.view(-1, 1, _RUN)
            codes = torch.cat((in_bytes & 15, in_bytes >> 4), dim=1)
        case "pairs":
            in_bytes = elements.view(-1, 1)
            codes = torch.cat((in_bytes & 15, in_bytes >> 4), dim=1)
        case _:
            codes = elements
    return codes.reshape(n, k).to(torch.int32)


def _in_memory(scales: Tensor, precision: Precision) -> Tensor:
    """Bytes of scales whose bits are int32 [experts, ...], in the order of memory."""
    assert precision.scales is not None
    if precision.scales.granularity == "group" and not precision.scaled_by_matrix_unit:
        scales = scales.transpose(1, 2)
    flat = scales.reshape(scales.shape[0], -1).contiguous()
    return flat.to(torch.uint8) if precision.scales.itemsize == 1 else flat.view(torch.uint8)


def _times_groups(elements: Tensor, scales: Tensor, outer: Tensor, precision: Precision) -> Tensor:
    """``elements`` [n, groups, group] times the scales of their groups, whose bytes are ``scales``."""
    assert precision.scales is not None
    n, groups, _ = elements.shape
    in_turn = scales if precision.scales.itemsize == 1 else scales.view(torch.int32)
    bits = in_turn.view(n, groups) if precision.scaled_by_matrix_unit else in_turn.view(groups, n).T
    bits = bits.to(torch.int32).unsqueeze(2).contiguous()
    match precision.scales.dtype:
        case "bf16_pair":
            scale, offset = (bits << 16).view(torch.float32), (bits & -0x10000).view(torch.float32)
            return elements * scale + offset
        case "e8m0":
            return elements * (bits << 23).view(torch.float32)
        case "e4m3":
            return elements * e4m3_values(bits) * outer
        case _:
            return elements * bits.view(torch.float32)
