"""What a kernel for the CPU is given beside its arguments, as ctypes."""

from __future__ import annotations

import ctypes


class Host(ctypes.Structure):
    """``tw_host`` of templates/shared/abi.jinja: the ABI's version, threads, and the address that starts them."""

    _fields_ = (("abi_version", ctypes.c_int32), ("threads", ctypes.c_int32), ("fork", ctypes.c_void_p))
