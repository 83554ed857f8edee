"""How weights lie in memory: as the op declares them, or packed for a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tilewright.codegen.numbers.precisions import LOSSLESS, Precision, find_precision

_SCALE_ALIGNMENT = 256
"""Of the address of scales behind elements: what GPU allocators align to."""


@dataclass(frozen=True)
class WeightLayout:
    """Weights [experts, n, k] packed in panels: [experts, panels, rows, ``columns``], zero-padded to whole panels.

    A panel holds ``columns`` columns and is contiguous, so that a kernel streams it. With ``halves`` = 2 the n axis is
    two halves (gate, then up), which alternate in runs of ``run`` columns, the same output columns of each, before they
    are cut into panels: one register tile then holds both factors of an output, side by side in a panel
    (``columns`` a multiple of ``2 * run``) or in neighbouring panels (``columns`` = ``run``).

    A row of a panel is a step of k. In a precision that quantises, a row is a word of 32 bits for each column and holds
    several steps; one row of scales comes before the rows of the groups that it serves (codegen/numbers/precisions.py).

    Raises:
        TilewrightError: for a precision that this release does not know.

    """

    columns: int
    halves: int = 1
    run: int = 0
    """Columns of one half that lie together; 0 (only with ``halves`` = 1): a whole panel."""
    precision: str = LOSSLESS

    def __post_init__(self) -> None:
        find_precision(self.precision)

    @property
    def stored(self) -> Precision:
        """What :attr:`precision` means."""
        return find_precision(self.precision)

    @property
    def key(self) -> str:
        """Short name; equal keys mean the same bytes."""
        return f"panel{self.columns}" + (f"x{self.halves}r{self.run}" if self.halves > 1 else "") + f"_{self.precision}"

    def panels(self, n: int) -> int:
        """Panels per expert for a weight of ``n`` rows in all (both halves counted)."""
        run = self.run or self.columns
        runs = self.halves * -(-(n // self.halves) // run)
        return -(-runs * run // self.columns)

    def packed_words(self, experts: int, n: int, k: int) -> int:
        """Words of 32 bits (floats, where nothing is quantised) of the packed weight, padding included."""
        return experts * self.panels(n) * self.stored.rows(k) * self.columns


@dataclass(frozen=True)
class RowLayout:
    """Weights [experts, n, k] as GPU kernels read them: rows of elements as the op declares them, then all scales.

    The elements of a row lie in order of k, row after row. Two elements of 4 bits share a byte: steps k and k + 16 of
    32 (``runs``), so that a kernel takes the halves of a tile as two tiles without a shuffle, or steps k and k + 1
    (``pairs``), as block-scaled matrix units take them; the first in the lower half.

    Scales begin at the next multiple of 256 bytes: fp32 [experts] (``tensor``), fp32 [experts, n] (``channel``),
    [experts, groups of k, n] for groups that a kernel multiplies with itself (int8: fp32, int4: a word of two bf16, the
    scale in the lower half, mxfp4: e8m0, nvfp4_a16: e4m3), e8m0 or e4m3 [experts, n, groups of k] for those that the
    matrix unit multiplies, or fp32 [experts, ceil(k / 128), ceil(n / 128)] (``block``). Scales of scales (nvfp4: fp32
    [experts]) begin at the next multiple of 256 bytes.

    Raises:
        TilewrightError: for a precision that this release does not know.

    """

    precision: str
    nibbles: Literal["none", "runs", "pairs"] = "none"
    form: Literal["rows"] = "rows"
    """Tells its JSON from a :class:`WeightLayout`'s."""

    def __post_init__(self) -> None:
        find_precision(self.precision)

    @property
    def stored(self) -> Precision:
        """What :attr:`precision` means."""
        return find_precision(self.precision)

    @property
    def key(self) -> str:
        """Short name; equal keys mean the same bytes."""
        return f"rows_{self.precision}" + (f"_{self.nibbles}" if self.nibbles != "none" else "")

    def element_bytes(self, experts: int, n: int, k: int) -> int:
        """Bytes of all elements."""
        return experts * n * k * self.stored.bits // 8

    def scale_shape(self, experts: int, n: int, k: int) -> tuple[int, ...]:
        """Shape of the scales; empty without any."""
        scales = self.stored.scales
        if scales is None:
            return ()
        match scales.granularity:
            case "tensor":
                return (experts,)
            case "channel":
                return (experts, n)
            case "block":
                return (experts, -(-k // scales.group), -(-n // scales.group))
            case _:
                groups = k // scales.group
                return (experts, n, groups) if self.stored.scaled_by_matrix_unit else (experts, groups, n)

    def scale_offset(self, experts: int, n: int, k: int) -> int:
        """Where the scales begin, in bytes."""
        return _aligned(self.element_bytes(experts, n, k))

    def outer_offset(self, experts: int, n: int, k: int) -> int:
        """Where the scales of scales begin, in bytes; where the scales end, rounded up, without any."""
        return _aligned(self._scales_end(experts, n, k))

    def packed_bytes(self, experts: int, n: int, k: int) -> int:
        """Bytes of elements and scales together."""
        scales = self.stored.scales
        if scales is None:
            return self.element_bytes(experts, n, k)
        if scales.outer:
            return self.outer_offset(experts, n, k) + 4 * experts
        return self._scales_end(experts, n, k)

    def _scales_end(self, experts: int, n: int, k: int) -> int:
        itemsize = self.stored.scales.itemsize if self.stored.scales else 0
        return self.scale_offset(experts, n, k) + itemsize * math.prod(self.scale_shape(experts, n, k))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _SCALE_ALIGNMENT) * _SCALE_ALIGNMENT
