"""A shared object from bytes, by way of a file in memory that nobody can change between the check and the loading.

Such a file has no name in any folder, and once it is sealed not even this process can write to it. So what is loaded
is what was checked, whoever may write to the folders of this machine.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os

_MFD_EXEC = 0x10
"""Says that the file is to be executed; Linux before 6.3 does not know it, and then there is nothing to say."""
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_numbers = itertools.count(1)


def load_from_memory(name: str, data: bytes) -> ctypes.CDLL:
    """The shared object ``data``, loaded; ``name`` is what profilers call it.

    Raises:
        OSError: where files in memory cannot be executed (``vm.memfd_noexec=2``, SELinux, no /proc), or when the bytes
            are no shared object.

    """
    descriptor = _sealed_file(name, data)
    try:
        return ctypes.CDLL(_path_never_used(descriptor))
    finally:
        os.close(descriptor)


def _sealed_file(name: str, data: bytes) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        descriptor = os.memfd_create(name, flags | _MFD_EXEC)
    except OSError:
        descriptor = os.memfd_create(name, flags)
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _path_never_used(descriptor: int) -> str:
    """A path of an open file that no other load of this process has had.

    The loader remembers names, and numbers of descriptors come again: it would answer with another library. So the
    path holds a number of its own, in binary: ``./`` for a one and ``/`` for a zero, which change nothing in a path.
    """
    number = "".join("./" if digit == "1" else "/" for digit in f"{next(_numbers):b}")
    return f"/proc/self/fd/{number}{descriptor}"
