"""Arrays of a library that is not torch: they speak DLPack, and tell their stream by its exchange table."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_int32, c_void_p, py_object
from typing import Any

import torch
from posing import Posed
from torch import Tensor

from tilewright.runtime.calls.exchange import ExchangeTable, exchange_table

_NAME = b"dlpack_exchange_api"
_READ = ctypes.PYFUNCTYPE(c_int, py_object, c_void_p)


class OtherArray:
    """Holds the memory of a posed tensor."""

    stream = 0
    """Handle of the one on which the library works."""
    __dlpack_c_exchange_api__: object

    def __init__(self, posed: Posed) -> None:
        self.posed = posed

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.posed.__dlpack_device__()
        return int(kind), index

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> object:
        assert stream == -1, "nobody is to wait"
        return torch.utils.dlpack.to_dlpack(self.posed)


class SilentArray(OtherArray):
    """One that does not tell its stream."""


_of_torch = exchange_table(Tensor)


@_READ
def _read(array: OtherArray, out: int) -> int:
    assert _of_torch is not None
    return int(_READ(_of_torch.dltensor_from_py_object_no_sync)(array.posed, out))


@ctypes.PYFUNCTYPE(c_int, c_int, c_int32, POINTER(c_void_p))
def _stream(device_type: int, device_id: int, out: Any) -> int:
    del device_type, device_id
    out[0] = OtherArray.stream or None
    return 0


_table = ExchangeTable(
    major=1,
    minor=3,
    dltensor_from_py_object_no_sync=ctypes.cast(_read, c_void_p).value,
    current_work_stream=ctypes.cast(_stream, c_void_p).value,
)
_new = ctypes.PYFUNCTYPE(py_object, c_void_p, ctypes.c_char_p, c_void_p)(("PyCapsule_New", ctypes.pythonapi))
OtherArray.__dlpack_c_exchange_api__ = _new(ctypes.addressof(_table), _NAME, None)
SilentArray.__dlpack_c_exchange_api__ = None
