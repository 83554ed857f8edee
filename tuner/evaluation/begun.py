"""What a measuring worker runs now, in memory that its parent sees even when it dies of it. Standard library only."""

from __future__ import annotations

import mmap
import os

_BYTES = 16


class Begun:
    """How many calls were begun, and which program was begun last, in a file that both sides map.

    Args:
        fd: of the file; None makes one, whose descriptor is :attr:`fd` until it is closed.

    """

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("tilewright-begun", os.MFD_CLOEXEC)
            os.truncate(fd, _BYTES)
        self.fd = fd
        self._numbers = memoryview(mmap.mmap(fd, _BYTES)).cast("q")

    def begin(self, program: int) -> None:
        """Tell the parent what runs from now on, so that it knows whom to blame."""
        self._numbers[1] = program
        self._numbers[0] += 1

    def forget(self) -> None:
        """Nothing runs yet."""
        self._numbers[1] = 0

    @property
    def calls(self) -> int:
        """How many were begun."""
        return self._numbers[0]

    @property
    def program(self) -> int:
        """Number of the one that was begun last; 0 when nothing was."""
        return self._numbers[1]
