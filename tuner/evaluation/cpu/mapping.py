"""Memory between two guard pages. Standard library only: the worker imports this."""

from __future__ import annotations

import ctypes
import mmap
import os

PAGE = mmap.PAGESIZE
ALIGNMENT = 64
"""Bytes to which every tensor and workspace is aligned, as in deployment."""

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MADV_HUGEPAGE = 14
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


class GuardedMapping:
    """A file mapped so that the bytes before and after it cannot be touched without a segmentation fault.

    A tensor is placed so that it ends (rounded up to 64 bytes) where the mapping ends: ``end - round_up(nbytes, 64)``.
    All pages are present, so that no call pays for a page fault.

    Args:
        fd: file of ``nbytes``, a multiple of the page size; may be closed afterwards.
        nbytes: length.
        writable: whether writes go through to the file; otherwise they are segmentation faults.
        huge_pages: copy a read-only file to anonymous memory that is advised to have huge pages.

    Raises:
        OSError: when memory is short.

    """

    def __init__(self, fd: int, nbytes: int, *, writable: bool, huge_pages: bool = False) -> None:
        self._length = nbytes + 2 * PAGE
        self._base = _map(None, self._length, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        start = self._base + PAGE
        self.end = start + nbytes
        if writable:
            _map(start, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | mmap.MAP_POPULATE, fd)
        elif huge_pages:
            self._copy(fd, start, nbytes)
        else:
            _map(start, nbytes, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_POPULATE, fd)

    def _copy(self, fd: int, start: int, nbytes: int) -> None:
        _map(start, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        # Advice: nothing depends on its success.
        _libc.madvise(start, nbytes, _MADV_HUGEPAGE)
        source = _map(None, nbytes, mmap.PROT_READ, mmap.MAP_PRIVATE, fd)
        ctypes.memmove(start, source, nbytes)
        _libc.munmap(source, nbytes)
        if _libc.mprotect(start, nbytes, mmap.PROT_READ):
            raise _last_error()

    def close(self) -> None:
        """Unmap."""
        _libc.munmap(self._base, self._length)


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    fixed = 0 if address is None else _MAP_FIXED
    result = _libc.mmap(address, nbytes, protection, flags | fixed, fd, 0)
    if result == _MAP_FAILED:
        raise _last_error()
    return int(result)


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
