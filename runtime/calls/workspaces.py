"""Scratch memory of kernels on devices: one piece for each stream, which kernels use one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from tilewright.errors import TilewrightError
from tilewright.runtime.calls.exchange import read_array
from tilewright.runtime.calls.extension import native_module
from tilewright.runtime.calls.memory import StridedMemory

_LEAST_BYTES: Final = 1 << 20
_GROWTH: Final = 2


class Workspaces:
    """Pieces of memory by device and stream. A piece grows, and what was given out once is never given back.

    A CUDA graph that was captured goes on using the addresses that it saw. As a piece at least doubles when it grows,
    all of them together take at most twice as much as the last.
    """

    def __init__(self) -> None:
        native = native_module()
        self.native: Any = None if native is None else native.Workspaces()
        """The same for the extension; None without it."""
        self._pieces: dict[tuple[int, int], tuple[int, int]] = {}
        """Address and bytes by device and stream."""
        self._owners: list[object] = []

    def find(self, device_index: int, stream: int, nbytes: int) -> int | None:
        """Address of a piece of at least ``nbytes`` bytes; None where one has to be made."""
        address, held = self._pieces.get((device_index, stream), (0, 0))
        return address if held >= nbytes else None

    def make(self, device_index: int, stream: int, nbytes: int, allocate: Callable[[int], object]) -> int:
        """Address of a new piece of at least ``nbytes`` bytes, used for this stream from now on.

        Args:
            device_index: of the device.
            stream: its handle.
            nbytes: at least.
            allocate: gives a tensor, or what speaks DLPack, of at least as many bytes as it is asked for.

        Raises:
            TilewrightError: when it gives too little, or nothing.

        """
        _, before = self._pieces.get((device_index, stream), (0, 0))
        wanted = max(nbytes, _GROWTH * before, _LEAST_BYTES)
        owner = allocate(wanted)
        memory = _memory_of(owner)
        given = memory.elements * memory.itemsize if memory is not None and memory.is_contiguous else 0
        if memory is None or not memory.address or given < nbytes:
            raise TilewrightError(f"it needs {nbytes} bytes of workspace, and was given {given}")
        self._owners.append(owner)
        self._pieces[device_index, stream] = memory.address, given
        if self.native is not None:
            self.native.keep(device_index, stream, memory.address, given)
        return memory.address


def _memory_of(owner: Any) -> StridedMemory | None:
    if isinstance(owner, Tensor):
        return StridedMemory.of(owner)
    try:
        return read_array(owner).memory
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
        return None


WORKSPACES: Final = Workspaces()
"""Of all calls that were not bound with memory of their own."""
