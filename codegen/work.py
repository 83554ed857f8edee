"""What one launch of a GPU kernel has to do: what predictions are made from. Plain data, supplied by the template."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchWork:
    """Work of one launch at one problem, as the kernel's tiling makes it."""

    entry: str
    programs: int
    """Blocks of the grid that have something to do."""
    steps: float
    """Iterations of the main loop of one program."""
    step_flops: float
    """Of the matrix units in one iteration, padding included; a multiply-add is two."""
    mma_dtype: str
    """Type of the operands that the matrix unit gets: a key of ``GpuArch.mma``."""
    step_bytes: float
    """Loaded by one program in one iteration."""
    scalar_ops: float
    """Per iteration outside the matrix units: unpacking of elements, scales, exponentials."""
    dram_bytes: float
    """Least traffic of the whole launch: every byte counted once."""
    epilogue_bytes: float
    """Stored, and loaded, by one program after its main loop."""
    tile: tuple[int, int] = (0, 0)
    """Rows and columns that one program adds up at once; (0, 0) where it multiplies nothing."""

    resident: int = 0
    """Blocks for a multiprocessor, which go through the work of all programs; 0: every program is a block."""

    @property
    def accumulators(self) -> int:
        """Sums that one program holds."""
        return self.tile[0] * self.tile[1]
