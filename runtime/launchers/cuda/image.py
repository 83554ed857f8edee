"""What a cubin was assembled for, as its ELF header says it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from tilewright.runtime.launchers.base import KernelRefused

_MAGIC: Final = b"\x7fELF\x02\x01"
_MACHINE: Final = 190
"""``EM_CUDA``."""
_ABI_OF_CUDA_13: Final = 8
_EXACT, _EXACT_OF_CUDA_13 = 0x800, 0x8
"""Bits of ``e_flags``, as read off what ptxas 12.8 makes in both forms; 13.1 sets none."""


@dataclass(frozen=True)
class Target:
    """An instruction set of NVIDIA's."""

    sm: int
    """Compute capability in one number: 90 of 9.0."""
    is_exact: bool
    """Whether it says that it has instructions of this one alone (``sm_90a``); else later ones of its major number run
    it, too."""

    def runs_on(self, sm: int) -> bool:
        """Whether a device of compute capability ``sm`` runs it."""
        return sm == self.sm or (not self.is_exact and sm // 10 == self.sm // 10 and sm > self.sm)

    def __str__(self) -> str:
        return f"sm_{self.sm}{'a' if self.is_exact else ''}"


def read_target(image: bytes) -> Target:
    """What ``image`` was assembled for.

    Raises:
        KernelRefused: for bytes that are no cubin.

    """
    if len(image) < 64 or not image.startswith(_MAGIC) or struct.unpack_from("<H", image, 18) != (_MACHINE,):
        raise KernelRefused("it is no binary for NVIDIA's GPUs; tune again")
    (flags,) = struct.unpack_from("<I", image, 48)
    if image[8] >= _ABI_OF_CUDA_13:
        return Target(flags >> 8 & 0xFF, bool(flags & _EXACT_OF_CUDA_13))
    return Target(flags & 0xFF, bool(flags & _EXACT))
