"""How weights lie in memory: as the op declares them, or packed for a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScaleSpec:
    """Scales of a quantised tensor (declared here for every precision; fp32 weights have none)."""

    dtype: str
    granularity: Literal["tensor", "channel", "group", "block"]
    axis: int
    group: int = 0
    """Elements that share a scale along ``axis``; 0: all of them."""
    swizzle: str = ""


@dataclass(frozen=True)
class WeightLayout:
    """Weights [experts, n, k] packed in panels: [experts, panels, k, ``columns``], zero-padded to whole panels.

    A panel holds ``columns`` columns and is contiguous, so that a kernel streams it. With ``halves`` = 2 the n axis is
    two halves (gate, then up), which alternate in runs of ``run`` columns, the same output columns of each, before they
    are cut into panels: one register tile then holds both factors of an output, side by side in a panel
    (``columns`` a multiple of ``2 * run``) or in neighbouring panels (``columns`` = ``run``).
    """

    columns: int
    halves: int = 1
    run: int = 0
    """Columns of one half that lie together; 0 (only with ``halves`` = 1): a whole panel."""
    dtype: str = "fp32"
    scales: ScaleSpec | None = None

    @property
    def key(self) -> str:
        """Short name; equal keys mean the same bytes."""
        return f"panel{self.columns}" + (f"x{self.halves}r{self.run}" if self.halves > 1 else "") + f"_{self.dtype}"

    def panels(self, n: int) -> int:
        """Panels per expert for a weight of ``n`` rows in all (both halves counted)."""
        run = self.run or self.columns
        runs = self.halves * -(-(n // self.halves) // run)
        return -(-runs * run // self.columns)

    def packed_elements(self, experts: int, n: int, k: int) -> int:
        """Elements of the packed weight, padding included."""
        return experts * self.panels(n) * k * self.columns
