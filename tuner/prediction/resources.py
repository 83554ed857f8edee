"""What a launch takes of a multiprocessor: read from its binary, or estimated from its tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.work import LaunchWork

_OTHER_REGISTERS = 50
"""Addresses, masks and operands beside the accumulators: typical of compiled GEMM kernels."""


class BinaryFacts(Protocol):
    """The part of what a binary tells that predictions are made from."""

    @property
    def entry(self) -> str:
        """Name of the entry point."""

    @property
    def registers(self) -> int:
        """Per thread."""

    @property
    def smem_bytes(self) -> int:
        """Of one block."""

    @property
    def num_warps(self) -> int:
        """Of one block."""

    @property
    def spill_store_bytes(self) -> int:
        """Per thread."""

    @property
    def spill_load_bytes(self) -> int:
        """Per thread."""


@dataclass(frozen=True)
class Resources:
    """Of one block."""

    num_warps: int
    num_stages: int
    """Of the main loop's pipeline; 1: none."""
    registers: int
    """Per thread."""
    smem_bytes: int
    spill_bytes: int = 0
    """Per thread: stored and loaded."""
    computing_warps: int = 0
    """Of a block whose other warps only load; 0: all of them."""

    @classmethod
    def of_binary(cls, facts: BinaryFacts, num_stages: int, computing_warps: int = 0) -> Resources:
        """As the binary says; only the number of stages, and which warps compute, does not stand in it."""
        spilled = facts.spill_store_bytes + facts.spill_load_bytes
        return cls(facts.num_warps, num_stages, facts.registers, facts.smem_bytes, spilled, computing_warps)

    @classmethod
    def estimated(cls, work: LaunchWork, arch: GpuArch, num_warps: int, num_stages: int) -> Resources:
        """From the tile alone: sums and a usual rest; a buffer per stage, one less where threads copy."""
        sums = work.accumulators / (arch.warp_size * num_warps)
        registers = min(arch.registers_per_thread, int(sums) + _OTHER_REGISTERS)
        if "tcgen05" in arch.capabilities:
            registers = min(registers, 128)  # sums are in tensor memory until the epilogue
        keeps_all = not {"wgmma", "tcgen05"}.isdisjoint(arch.capabilities)
        buffers = max(1, num_stages if keeps_all else num_stages - 1)
        return cls(num_warps, num_stages, registers, int(buffers * work.step_bytes))

    def blocks_per_sm(self, arch: GpuArch) -> int:
        """Blocks that one multiprocessor holds at once; 0: it cannot hold even one."""
        threads = self.num_warps * arch.warp_size
        per_warp = -(-self.registers * arch.warp_size // arch.register_unit) * arch.register_unit
        smem = self.smem_bytes + arch.smem_reserved_bytes
        if self.smem_bytes > arch.smem_bytes_per_block or threads > arch.threads_per_block:
            return 0
        limits = [arch.blocks_per_sm, arch.threads_per_sm // threads]
        limits.append(arch.registers_per_sm // max(1, per_warp * self.num_warps))
        if smem:
            limits.append(arch.smem_bytes_per_sm // smem)
        return min(limits)
