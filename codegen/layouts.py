"""How weights lie in memory: as the op declares them, or packed for a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.precisions import LOSSLESS, Precision, find_precision


@dataclass(frozen=True)
class WeightLayout:
    """Weights [experts, n, k] packed in panels: [experts, panels, rows, ``columns``], zero-padded to whole panels.

    A panel holds ``columns`` columns and is contiguous, so that a kernel streams it. With ``halves`` = 2 the n axis is
    two halves (gate, then up), which alternate in runs of ``run`` columns, the same output columns of each, before they
    are cut into panels: one register tile then holds both factors of an output, side by side in a panel
    (``columns`` a multiple of ``2 * run``) or in neighbouring panels (``columns`` = ``run``).

    A row of a panel is a step of k. In a precision that quantises, a row is a word of 32 bits for each column and holds
    several steps; one row of scales comes before the rows of the groups that it serves (codegen/precisions.py).

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

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> WeightLayout:
        """Layout from its JSON form; one without a precision has a ``dtype`` instead, which was always fp32."""
        own = {name: value for name, value in fields.items() if name not in ("dtype", "scales")}
        return cls(**{"precision": fields.get("dtype", LOSSLESS), **own})
