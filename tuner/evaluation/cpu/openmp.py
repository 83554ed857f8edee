"""The library that kernels get their threads from, as the runtime finds it."""

from __future__ import annotations

import ctypes
import os

from tilewright.errors import TilewrightError


def openmp_library() -> str:
    """Path of the library whose thread pool the runtime uses, so that measuring is as deployed.

    Raises:
        TilewrightError: when there is none.

    """
    from tilewright.runtime.launchers.openmp import fork_address

    class Symbol(ctypes.Structure):
        _fields_ = [
            ("file", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("name", ctypes.c_char_p),
            ("address", ctypes.c_void_p),
        ]

    symbol = Symbol()
    address = fork_address()
    if not address or not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(symbol)):
        raise TilewrightError("found no OpenMP library to run threads with; install torch with OpenMP, or libgomp")
    return os.fsdecode(symbol.file)
