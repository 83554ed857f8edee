"""Memory of a device by the CUDA driver alone: got, copied to and from, filled. For the tuner's measuring process."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_size_t, c_ubyte, c_uint64, c_void_p
from typing import Any, Final

from tilewright.runtime.launchers.cuda.driver import Driver

OUT_OF_MEMORY: Final = 2
"""``CUDA_ERROR_OUT_OF_MEMORY``."""
_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "cuMemAlloc": (POINTER(c_uint64), c_size_t),
    "cuMemFree": (c_uint64,),
    "cuMemcpyHtoD": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH": (c_void_p, c_uint64, c_size_t),
    "cuMemsetD8": (c_uint64, c_ubyte, c_size_t),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuMemGetInfo": (POINTER(c_size_t), POINTER(c_size_t)),
}


class DeviceMemory:
    """Memory of the device whose context is current.

    Raises:
        TilewrightError: when the driver lacks a function.

    """

    def __init__(self, driver: Driver) -> None:
        driver.load(_FUNCTIONS)
        self._driver = driver

    def allocate(self, nbytes: int) -> int:
        """Address of ``nbytes`` at a multiple of 256.

        Raises:
            DriverError: when they cannot be had (``OUT_OF_MEMORY``).

        """
        address = c_uint64()
        self._driver.call("cuMemAlloc", ctypes.byref(address), max(nbytes, 1))
        return address.value

    def free(self, address: int) -> None:
        """Give back what :meth:`allocate` gave."""
        self._driver.call("cuMemFree", address)

    def write(self, address: int, host_address: int, nbytes: int) -> None:
        """Copy host memory to the device, and wait for it."""
        if nbytes:
            self._driver.call("cuMemcpyHtoD", address, host_address, nbytes)

    def read(self, host_address: int, address: int, nbytes: int) -> None:
        """Copy memory of the device to the host, and wait for it."""
        if nbytes:
            self._driver.call("cuMemcpyDtoH", host_address, address, nbytes)

    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        """Set every byte, on a stream."""
        if nbytes:
            self._driver.call("cuMemsetD8Async", address, byte, nbytes, stream)

    @property
    def free_bytes(self) -> int:
        """That could be had now."""
        free, total = c_size_t(), c_size_t()
        self._driver.call("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value
