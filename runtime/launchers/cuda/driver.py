"""The CUDA driver by ctypes: the functions that launching needs, their structures, and its errors in words.

Names, values and layouts are those of the CUDA driver API (``cuda.h``, 12.4 and later).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Final

from tilewright.errors import TilewrightError
from tilewright.runtime.locks import fork_safe_lock

DRIVER_VARIABLE: Final = "TILEWRIGHT_CUDA_DRIVER"
"""Environment variable: path of the driver's library, where it is not to be found by its name."""
_LIBRARY: Final = "libcuda.so.1"
_OLDEST: Final = 12040
"""``cuFuncGetParamInfo`` came with CUDA 12.4."""

CAPABILITY_MAJOR, CAPABILITY_MINOR, SM_COUNT, SMEM_PER_BLOCK = 75, 76, 16, 97
"""``CUdevice_attribute``; the last one is what a block may ask for (opt-in)."""
MAX_DYNAMIC_SMEM, NON_PORTABLE_CLUSTER = 8, 14
"""``CUfunction_attribute``."""
CLUSTER_DIMENSION, CLUSTER_SCHEDULING, COOPERATIVE, PROGRAMMATIC = 4, 5, 2, 6
"""``CUlaunchAttributeID``."""
CLUSTER_SPREAD: Final = 1
"""``CU_CLUSTER_SCHEDULING_POLICY_SPREAD``."""
_NOT_CAPTURING: Final = 0


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``: a number and a value of 64 bytes, of which launches here use integers alone."""

    _fields_ = (("id", c_uint), ("padding", c_char * 4), ("value", c_uint * 16))


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_memory_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(LaunchAttribute)),
        ("attribute_count", c_uint),
    )


_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuFuncGetParamInfo": (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
    "cuLaunchKernelEx": (POINTER(LaunchConfig), c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuTensorMapEncodeTiled": (
        c_void_p,
        c_int,
        c_uint,
        c_void_p,
        POINTER(c_uint64),
        POINTER(c_uint64),
        POINTER(c_uint),
        POINTER(c_uint),
        c_int,
        c_int,
        c_int,
        c_int,
    ),
    "cuStreamIsCapturing": (c_void_p, POINTER(c_int)),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


def library_name() -> str:
    """Name or path of the driver's library: ``$TILEWRIGHT_CUDA_DRIVER``, or what systems call it."""
    return os.environ.get(DRIVER_VARIABLE) or _LIBRARY


def find_driver() -> Driver:
    """The driver of this process, opened when it is first asked for; in a forked child its parent's, which refuses.

    Raises:
        TilewrightError: as :class:`Driver` does; it is tried anew the next time.

    """
    name = library_name()
    if (known := _drivers.get(name)) is not None:
        return known
    with _opening:
        if name not in _drivers:
            _drivers[name] = Driver(name)
        return _drivers[name]


class DriverError(TilewrightError):
    """The driver refused a call; ``code`` is its ``CUresult``."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class CudaDevice:
    """What the driver says of a device."""

    index: int
    """Among those that this process sees."""
    name: str
    capability: tuple[int, int]
    sm_count: int
    smem_bytes_per_block: int
    memory_bytes: int
    context: int
    """Address of its primary context, which torch uses, too."""

    @property
    def sm(self) -> int:
        """Compute capability in one number: 90 of 9.0."""
        return 10 * self.capability[0] + self.capability[1]


class Driver:
    """The driver's functions. Safe to share between threads; a forked child has no driver.

    Args:
        path: of its library; None: ``$TILEWRIGHT_CUDA_DRIVER``, or wherever the system has it.

    Raises:
        TilewrightError: when there is no such library, it is too old, or no device is there.

    """

    def __init__(self, path: str | None = None) -> None:
        named = path or library_name()
        try:
            self._library = ctypes.CDLL(named)
            find = self._library.cuGetProcAddress_v2
        except (AttributeError, OSError) as error:
            raise TilewrightError(
                f"{named} is no CUDA driver that can be opened ({error}); install NVIDIA's driver, "
                f"or name its library with ${DRIVER_VARIABLE}"
            ) from error
        find.argtypes = (c_char_p, POINTER(c_void_p), c_int, c_uint64, c_void_p)
        self._functions: dict[str, Any] = {}
        self.addresses: dict[str, int] = {}
        """Of the functions, for code that calls them by itself."""
        self.path = named
        """Of the library, or its name."""
        self._find = find
        self.load(_FUNCTIONS)
        self._pid = os.getpid()
        self._devices: dict[int, CudaDevice] = {}
        self.version = 0
        """As ``cuDriverGetVersion`` gives it: 13000 of CUDA 13.0."""
        self.call("cuInit", 0)
        version = c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.version = version.value

    def load(self, functions: Mapping[str, tuple[Any, ...]]) -> None:
        """Find further functions of the driver: their names, without a version (``cuMemAlloc``), and argument types.

        Raises:
            TilewrightError: when the driver lacks some.

        """
        lacking = []
        for name, types in functions.items():
            address = c_void_p()
            if self._find(name.encode(), ctypes.byref(address), _OLDEST, 0, None) or not address.value:
                lacking.append(name)
            else:
                self.addresses[name] = address.value
                self._functions[name] = ctypes.CFUNCTYPE(c_int, *types)(address.value)
        if lacking:
            raise TilewrightError(
                f"the CUDA driver {self.path} lacks {', '.join(lacking)}; at least CUDA 12.4 is needed: "
                "update the driver"
            )

    @property
    def version_text(self) -> str:
        """The version as people write it: 13.0."""
        return f"{self.version // 1000}.{self.version % 1000 // 10}"

    def call(self, name: str, *arguments: Any) -> None:
        """Call one of the driver's functions.

        Raises:
            DriverError: when it answers anything but success.
            TilewrightError: in a forked child.

        """
        self.require_own_process()
        if code := self._functions[name](*arguments):
            raise DriverError(f"{name}: {self.describe(code)}", code)

    def require_own_process(self) -> None:
        """Refuse to go on in a forked child, in which nothing of CUDA works.

        Raises:
            TilewrightError: says how to start it.

        """
        if os.getpid() != self._pid:
            raise TilewrightError(
                "a process that was forked after CUDA began cannot use it; start it with the method spawn"
            )

    def describe(self, code: int) -> str:
        """A ``CUresult`` in words, with its name."""
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            self._functions[function](code, ctypes.byref(text))
            texts.append((text.value or b"unknown").decode(errors="replace"))
        return f"{texts[0]} ({code}, {texts[1]})"

    @property
    def device_count(self) -> int:
        """Devices that this process sees."""
        count = c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def device(self, index: int) -> CudaDevice:
        """A device; asked once, and its primary context kept from then on.

        Raises:
            DriverError: when there is no such device, or no context of it.

        """
        if index not in self._devices:
            handle, context, name = c_int(), c_void_p(), ctypes.create_string_buffer(256)
            memory_bytes = c_size_t()
            self.call("cuDeviceGet", ctypes.byref(handle), index)
            self.call("cuDeviceGetName", name, len(name), handle)
            self.call("cuDeviceTotalMem", ctypes.byref(memory_bytes), handle)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
            major, minor, sm_count, smem_bytes = (
                self._attribute(which, handle)
                for which in (CAPABILITY_MAJOR, CAPABILITY_MINOR, SM_COUNT, SMEM_PER_BLOCK)
            )
            self._devices[index] = CudaDevice(
                index,
                name.value.decode(),
                (major, minor),
                sm_count,
                smem_bytes,
                memory_bytes.value,
                context.value or 0,
            )
        return self._devices[index]

    @contextmanager
    def current(self, device: CudaDevice) -> Iterator[None]:
        """Make a device's primary context this thread's, and afterwards what was before."""
        before = c_void_p()
        self.call("cuCtxGetCurrent", ctypes.byref(before))
        if before.value == device.context:
            yield
            return
        self.call("cuCtxSetCurrent", device.context)
        try:
            yield
        finally:
            self.call("cuCtxSetCurrent", before.value)

    def is_capturing(self, stream: int) -> bool:
        """Whether a CUDA graph records ``stream``; the context of its device has to be current."""
        status = c_int()
        self.call("cuStreamIsCapturing", stream, ctypes.byref(status))
        return status.value != _NOT_CAPTURING

    def _attribute(self, which: int, device: c_int) -> int:
        value = c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value


_drivers: dict[str, Driver] = {}
_opening = fork_safe_lock()
