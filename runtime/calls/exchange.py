"""The DLPack exchange: what libraries tell of their arrays, and the streams that they work on, without synchronising.

Structures and names are those of the public specification, version 1.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Final

from tilewright.runtime.calls.memory import StridedMemory

CPU, CUDA, ROCM, CUDA_MANAGED = 1, 2, 10, 13
"""``DLDeviceType``."""
DTYPES: Final = {
    "fp64": (2, 64),
    "fp32": (2, 32),
    "fp16": (2, 16),
    "bf16": (4, 16),
    "fp8_e4m3": (10, 8),
    "int64": (0, 64),
    "int32": (0, 32),
    "int8": (0, 8),
    "uint8": (1, 8),
}
"""``DLDataType`` of each dtype: code and bits of an element."""
_MAJOR: Final = 1
_NO_SYNCHRONISING: Final = -1


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


class ExchangeTable(ctypes.Structure):
    """``DLPackExchangeAPI``."""

    _fields_ = (
        ("major", c_uint32),
        ("minor", c_uint32),
        ("previous", c_void_p),
        ("managed_tensor_allocator", c_void_p),
        ("managed_tensor_from_py_object_no_sync", c_void_p),
        ("managed_tensor_to_py_object_no_sync", c_void_p),
        ("dltensor_from_py_object_no_sync", c_void_p),
        ("current_work_stream", c_void_p),
    )


@dataclass(frozen=True)
class Exchanged:
    """An array as its library describes it."""

    device_type: int
    device_id: int
    dtype: str
    """Name of one of :data:`DTYPES`; else what DLPack says of it."""
    memory: StridedMemory


def read_array(value: Any) -> Exchanged:
    """What an array that speaks DLPack is; nothing is waited for.

    Raises:
        AttributeError, BufferError, RuntimeError, TypeError, ValueError: what its library raises for what it cannot
            describe.

    """
    # A capsule that nobody takes from frees what it holds when it goes, and the array outlives it here.
    capsule = value.__dlpack__(stream=_NO_SYNCHRONISING)
    found = _Tensor.from_address(_pointer(capsule, b"dltensor"))
    shape = tuple(found.shape[: found.ndim])
    if found.strides:
        strides = tuple(found.strides[: found.ndim])
    else:
        rows = [1]
        for length in shape[:0:-1]:
            rows.append(rows[-1] * length)
        strides = tuple(reversed(rows[: found.ndim]))
    kind = (found.code, found.bits)
    named = {each: name for name, each in DTYPES.items()}.get(kind) if found.lanes == 1 else None
    memory = StridedMemory((found.data or 0) + found.byte_offset, shape, strides, max(1, found.bits // 8))
    return Exchanged(found.device_type, found.device_id, named or f"DLPack type {kind} x {found.lanes}", memory)


def exchange_table(kind: type) -> ExchangeTable | None:
    """The table of a library's array type; None where it has none of version 1."""
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    at: int | None = _pointer(capsule, b"dlpack_exchange_api")
    while at:
        table = ExchangeTable.from_address(at)
        if table.major == _MAJOR:
            return table
        at = table.previous
    return None


def current_stream(table: ExchangeTable, device_id: int) -> int:
    """The stream on which a library works now in this thread, of a CUDA device on which it has an array.

    Raises:
        RuntimeError: or what else the library raises.

    """
    stream = c_void_p()
    code = _CURRENT_STREAM(table.current_work_stream)(CUDA, device_id, ctypes.byref(stream))
    if code != 0:
        raise RuntimeError("the library of the arrays does not tell its stream")
    return stream.value or 0


_CURRENT_STREAM = ctypes.PYFUNCTYPE(c_int, c_int, c_int32, POINTER(c_void_p))


def _pointer(capsule: object, name: bytes) -> int:
    get = ctypes.PYFUNCTYPE(c_void_p, ctypes.py_object, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
    address: int = get(capsule, name)
    return address
