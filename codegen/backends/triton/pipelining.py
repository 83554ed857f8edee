"""How Triton keeps tiles in flight, as far as the spaces of templates have to know it."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.codegen.hardware.archs import GpuArch


@dataclass(frozen=True)
class Pipelining:
    """Of one family of archs, as Triton 3.7 lowers loops with ``num_stages``."""

    deep: bool
    """Whether copies to shared memory run by themselves, so that several tiles may be in flight; if not, one tile is on
    its way through registers, and operands that no loop loads stay in registers, too."""

    def buffers(self, num_stages: int) -> int:
        """Tiles that lie in shared memory at once."""
        return num_stages if self.deep else max(num_stages - 1, 1)

    def stages(self, *deep: int) -> tuple[int, ...]:
        """Values of ``num_stages`` that are worth a search: ``deep``, or those of a short pipeline."""
        return deep if self.deep else (1, 2)


_BY_FAMILY = {"cuda": Pipelining(deep=True), "hip": Pipelining(deep=False)}


def pipelining(arch: GpuArch) -> Pipelining:
    """How loops are pipelined on ``arch``."""
    return _BY_FAMILY[arch.family]
