"""Memory that the parent shares with the worker: files without a name, that end with the process."""

from __future__ import annotations

import itertools
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.cpu.mapping import ALIGNMENT, PAGE, round_up

_CANARY = 0xA5
_CANARY_BYTES = PAGE
_ids = itertools.count()


class SharedRegion:
    """Anonymous file that both sides map: here writable, in the worker between guard pages and mostly read-only.

    There is always at least a page in front of the data, which a kernel must leave as it is.

    Args:
        nbytes: of the data.
        advised: whether such memory is deployed with the advice to back it by huge pages, as packed weights are.

    Raises:
        TilewrightError: when the memory cannot be had.

    """

    def __init__(self, nbytes: int, *, advised: bool = False) -> None:
        self.id = next(_ids)
        self.capacity_bytes = round_up(nbytes, ALIGNMENT)
        self.file_bytes = round_up(self.capacity_bytes + _CANARY_BYTES, PAGE)
        self.huge_pages = huge_pages(advised=advised)
        """Whether the worker reads a copy of it on huge pages, which a shared file does not get."""
        try:
            self.fd = os.memfd_create("tilewright", os.MFD_CLOEXEC)
            os.truncate(self.fd, self.file_bytes)
            mapping = mmap.mmap(self.fd, self.file_bytes)
        except OSError as error:
            raise TilewrightError(
                f"cannot get {nbytes} bytes of shared memory ({error.strerror}); free memory or tune a smaller problem"
            ) from error
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)

    def close(self) -> None:
        """Let go of the memory, which goes when the last array on it does."""
        os.close(self.fd)
        self.bytes = np.empty(0, np.uint8)


@dataclass(frozen=True, eq=False)
class Block:
    """``nbytes`` at the end of a region, on a 64-byte boundary."""

    region: SharedRegion
    nbytes: int

    @property
    def _start(self) -> int:
        return self.region.file_bytes - round_up(self.nbytes, ALIGNMENT)

    def array(self, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The block as an array that shares its memory."""
        return self.region.bytes[self._start : self._start + self.nbytes].view(dtype).reshape(shape)

    def lay_canaries(self) -> None:
        """Fill what surrounds the block with a pattern that :meth:`damage` looks for."""
        for surrounding in self._surroundings():
            surrounding[:] = _CANARY

    def damage(self) -> str | None:
        """What was written outside the block since :meth:`lay_canaries`; None when nothing was."""
        before, after = (int(np.count_nonzero(part != _CANARY)) for part in self._surroundings())
        if not before and not after:
            return None
        return f"{before} bytes before and {after} bytes after it"

    def _surroundings(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        file = self.region.bytes
        return file[self._start - _CANARY_BYTES : self._start], file[self._start + self.nbytes :]


@dataclass(frozen=True)
class Pointer:
    """An address in a block."""

    block: Block
    offset_bytes: int = 0


def share(array: npt.NDArray[Any], *, advised: bool = False) -> Block:
    """Copy of ``array`` (C order) in a region of its own; ``advised`` as there."""
    block = Block(SharedRegion(array.nbytes, advised=advised), array.nbytes)
    block.array(array.dtype, array.shape)[...] = array
    return block


def huge_pages(*, advised: bool) -> bool:
    """Whether the system backs large allocations by huge pages: all of them, or those for which it is ``advised``."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = setting.read_text() if setting.exists() else ""
    return "[always]" in chosen or (advised and "[madvise]" in chosen)
