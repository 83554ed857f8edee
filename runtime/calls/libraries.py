"""The libraries whose arrays calls take on a device: which stream they work on, and who gives memory."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import torch
from torch import Tensor

from tilewright.errors import TilewrightError
from tilewright.runtime.calls.exchange import current_stream, exchange_table


class ArrayLibrary(Protocol):
    """What calls ask of a library of arrays."""

    name: str

    def stream(self, kind: type, device_index: int) -> int:
        """Handle of the stream on which it works now, in this thread, with arrays of the type ``kind``."""
        ...

    def allocate(self, nbytes: int, device_index: int) -> object:
        """An array of that many bytes, made for that stream."""
        ...


def library_of(value: Any) -> ArrayLibrary:
    """The library that ``value`` is an array of.

    Raises:
        TilewrightError: for one that tells no stream.

    """
    kind = type(value)
    if isinstance(value, Tensor):
        return _TORCH
    if kind.__module__.partition(".")[0] == _CUPY.name:
        return _CUPY
    if (table := exchange_table(kind)) is not None and table.current_work_stream:
        return _Described(kind.__module__.partition(".")[0])
    raise TilewrightError(
        f"{kind.__module__}.{kind.__qualname__} does not tell the stream that it is worked on; pass tensors of torch, "
        "arrays of cupy, or of a library with __dlpack_c_exchange_api__"
    )


class _Described:
    """A library that tells its stream by its exchange table, and is not asked for memory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def stream(self, kind: type, device_index: int) -> int:
        table = exchange_table(kind)
        assert table is not None
        return current_stream(table, device_index)

    def allocate(self, nbytes: int, device_index: int) -> object:
        raise TilewrightError(
            f"a workspace of {nbytes} bytes on device {device_index} is needed, and {self.name} is not known to give "
            "memory; bind the call with workspace="
        )


class _Torch:
    name = "torch"

    def stream(self, kind: type, device_index: int) -> int:
        if (table := exchange_table(kind)) is not None and table.current_work_stream:
            return current_stream(table, device_index)
        handle: int = torch.cuda.current_stream(device_index).cuda_stream  # torch before 2.10
        return handle

    def allocate(self, nbytes: int, device_index: int) -> object:
        return torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", device_index))


class _Cupy:
    name = "cupy"

    def stream(self, kind: type, device_index: int) -> int:
        del kind
        cupy: Any = sys.modules[self.name]
        with cupy.cuda.Device(device_index):
            handle: int = cupy.cuda.get_current_stream().ptr
        return handle

    def allocate(self, nbytes: int, device_index: int) -> object:
        cupy: Any = sys.modules[self.name]
        with cupy.cuda.Device(device_index):
            return cupy.empty(nbytes, dtype="uint8")


_TORCH, _CUPY = _Torch(), _Cupy()
