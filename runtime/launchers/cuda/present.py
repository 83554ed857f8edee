"""Which devices are there, as their driver describes them; asked without a context, so that none of them is used."""

from __future__ import annotations

import ctypes
import uuid
from ctypes import POINTER, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any, Final

from tilewright.codegen.hardware.devices import DriverFacts
from tilewright.runtime.launchers.cuda.driver import CAPABILITY_MAJOR, CAPABILITY_MINOR, SM_COUNT, Driver

_CLOCK_KHZ, _MEMORY_CLOCK_KHZ, _BUS_BITS, _L2_BYTES = 13, 36, 37, 38
"""``CUdevice_attribute``."""
_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "cuDeviceTotalMem": (POINTER(c_size_t), c_int),
    "cuDeviceGetUuid": (c_void_p, c_int),
}


@dataclass(frozen=True)
class PresentDevice:
    """A device that this process sees."""

    index: int
    """Among those that it sees."""
    uuid: str
    """By which other libraries know it, behind ``GPU-``, or ``MIG-`` where it is a part of one."""
    facts: DriverFacts

    @property
    def sm(self) -> int:
        """Compute capability in one number: 90 of 9.0."""
        major, minor = self.facts.capability
        return 10 * major + minor


def present_devices(driver: Driver) -> list[PresentDevice]:
    """All devices that this process sees, in the driver's order.

    Raises:
        TilewrightError: when the driver refuses.

    """
    driver.load(_FUNCTIONS)
    return [_describe(driver, index) for index in range(driver.device_count)]


def _describe(driver: Driver, index: int) -> PresentDevice:
    handle, name, memory = c_int(), ctypes.create_string_buffer(256), c_size_t()
    identity = ctypes.create_string_buffer(16)
    driver.call("cuDeviceGet", ctypes.byref(handle), index)
    driver.call("cuDeviceGetName", name, len(name), handle)
    driver.call("cuDeviceTotalMem", ctypes.byref(memory), handle)
    driver.call("cuDeviceGetUuid", identity, handle)

    def attribute(which: int) -> int:
        value = c_int()
        driver.call("cuDeviceGetAttribute", ctypes.byref(value), which, handle)
        return value.value

    facts = DriverFacts(
        name.value.decode(errors="replace"),
        (attribute(CAPABILITY_MAJOR), attribute(CAPABILITY_MINOR)),
        attribute(SM_COUNT),
        memory.value,
        clock_khz=attribute(_CLOCK_KHZ),
        memory_clock_khz=attribute(_MEMORY_CLOCK_KHZ),
        memory_bus_bits=attribute(_BUS_BITS),
        l2_bytes=attribute(_L2_BYTES),
    )
    return PresentDevice(index, str(uuid.UUID(bytes=identity.raw)), facts)
