"""Under which conditions a race was run: what the device's clocks, power and temperature were meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tilewright.tuner.evaluation.device.nvml import POWER_CAP, Nvml, Reading

_BETWEEN_READINGS_S = 0.02
"""The device's own meters are no faster."""
_COOLING_S = 5.0
"""Most that is waited for a device to recover."""
_POLL_S = 0.1

_T = TypeVar("_T", int, float)


@dataclass(frozen=True)
class Conditions:
    """Of one race; a range is the least and the most of what was read during it, None where nothing was."""

    method: str
    """How calls were timed: ``graph replay`` or ``events``."""
    driver: str
    """Its version."""
    sm_clock_mhz: tuple[int, int] | None
    memory_clock_mhz: tuple[int, int] | None
    power_w: tuple[float, float] | None
    temperature_c: tuple[int, int] | None
    throttled: tuple[str, ...]
    """Why clocks were held down at some moment of it; see :data:`tilewright.tuner.evaluation.device.nvml.REASONS`."""
    repeats: int = 0
    """How often the race was run before this one and thrown away, because the device was slowed down."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a range that is not known is left out."""
        ranges = {
            "sm_clock_mhz": self.sm_clock_mhz,
            "memory_clock_mhz": self.memory_clock_mhz,
            "power_w": self.power_w,
            "temperature_c": self.temperature_c,
        }
        return {
            "method": self.method,
            "driver": self.driver,
            **{name: list(each) for name, each in ranges.items() if each is not None},
            "throttled": list(self.throttled),
            "repeats": self.repeats,
        }


class Monitor:
    """Looks at a device while it races; knows nothing where the library is not there.

    A cap of the power is noted, and no reason to race again: kernels meet it where they are served, too, and all that
    race together meet it alike. What slows the device down from outside (heat, its power supply) passes.
    """

    def __init__(self, nvml: Nvml | None) -> None:
        self._nvml = nvml
        self._readings: list[Reading] = []
        self._next = 0.0

    def begin(self) -> None:
        """Forget what was seen: a race begins."""
        self._readings.clear()
        self._next = 0.0
        self.look()

    def look(self) -> None:
        """Read the device, unless that was just done."""
        if self._nvml is None or time.monotonic() < self._next:
            return
        self._readings.append(self._nvml.read())
        self._next = time.monotonic() + _BETWEEN_READINGS_S

    @property
    def slowed_down(self) -> bool:
        """Whether something beside a cap of the power held clocks down since the race began."""
        return bool({reason for reading in self._readings for reason in reading.reasons} - {POWER_CAP})

    def cool_down(self) -> None:
        """Wait until nothing but a cap of the power holds clocks down, for a few seconds at the most."""
        if self._nvml is None:
            return
        until = time.monotonic() + _COOLING_S
        while time.monotonic() < until and set(self._nvml.read().reasons) - {POWER_CAP}:
            time.sleep(_POLL_S)

    def conditions(self, method: str, driver: str, repeats: int) -> Conditions:
        """What was seen since the race began."""
        readings = self._readings
        reasons = dict.fromkeys(reason for reading in readings for reason in reading.reasons)
        return Conditions(
            method,
            driver,
            _range([each.sm_clock_mhz for each in readings]),
            _range([each.memory_clock_mhz for each in readings]),
            _range([each.power_w for each in readings]),
            _range([each.temperature_c for each in readings]),
            tuple(reasons),
            repeats,
        )


def _range(values: Sequence[_T | None]) -> tuple[_T, _T] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None
