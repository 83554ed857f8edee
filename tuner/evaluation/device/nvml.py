"""NVIDIA's management library by ctypes: clocks, power, temperature, and why clocks are lower than they could be.

Names and values are those of ``nvml.h``. The library comes with the driver; without it, nothing is known of these.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any, Final

LIBRARY_VARIABLE: Final = "TILEWRIGHT_NVML"
"""Environment variable: path of the library, where it is not to be found by its name."""
_LIBRARY: Final = "libnvidia-ml.so.1"
_SM_CLOCK, _MEMORY_CLOCK = 1, 2
"""``nvmlClockType_t``."""
_OF_THE_CHIP: Final = 0
"""``NVML_TEMPERATURE_GPU``."""

REASONS: Final = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
}
"""Bits of ``nvmlDeviceGetCurrentClocksEventReasons`` under which clocks are held down."""
POWER_CAP: Final = REASONS[0x4]

_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "nvmlInit_v2": (),
    "nvmlDeviceGetHandleByUUID": (c_char_p, POINTER(c_void_p)),
    "nvmlDeviceGetClockInfo": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetPowerUsage": (c_void_p, POINTER(c_uint)),
    "nvmlDeviceGetTemperature": (c_void_p, c_int, POINTER(c_uint)),
}
_REASON_FUNCTIONS: Final = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
"""The newer name, and the one that drivers before 535 know."""


@dataclass(frozen=True)
class Reading:
    """One look at a device; None for what it does not tell."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    reasons: tuple[str, ...]
    """Of :data:`REASONS`."""


class Nvml:
    """One device, as the library sees it."""

    def __init__(self, library: ctypes.CDLL, device: c_void_p) -> None:
        self._library = library
        self._device = device
        names = [name for name in _REASON_FUNCTIONS if hasattr(library, name)]
        self._reasons = getattr(library, names[0]) if names else None
        if self._reasons is not None:
            self._reasons.argtypes = (c_void_p, POINTER(c_ulonglong))

    @classmethod
    def find(cls, uuid: str) -> Nvml | None:
        """The device with a UUID; None where the library is missing, or knows no such device."""
        try:
            library = ctypes.CDLL(os.environ.get(LIBRARY_VARIABLE) or _LIBRARY)
            for name, types in _FUNCTIONS.items():
                getattr(library, name).argtypes = types
        except (OSError, AttributeError):
            return None
        if library.nvmlInit_v2():
            return None
        device = c_void_p()
        for prefix in ("GPU-", "MIG-"):
            if library.nvmlDeviceGetHandleByUUID(f"{prefix}{uuid}".encode(), ctypes.byref(device)) == 0:
                return cls(library, device)
        return None

    def read(self) -> Reading:
        """How the device is doing at this moment."""
        power_mw = self._number("nvmlDeviceGetPowerUsage")
        return Reading(
            self._number("nvmlDeviceGetClockInfo", _SM_CLOCK),
            self._number("nvmlDeviceGetClockInfo", _MEMORY_CLOCK),
            None if power_mw is None else power_mw / 1e3,
            self._number("nvmlDeviceGetTemperature", _OF_THE_CHIP),
            self._held_down_by(),
        )

    def _number(self, function: str, *arguments: int) -> int | None:
        value = c_uint()
        failed = getattr(self._library, function)(self._device, *arguments, ctypes.byref(value))
        return None if failed else value.value

    def _held_down_by(self) -> tuple[str, ...]:
        bits = c_ulonglong()
        if self._reasons is None or self._reasons(self._device, ctypes.byref(bits)):
            return ()
        return tuple(name for bit, name in REASONS.items() if bits.value & bit)
