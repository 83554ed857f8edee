"""Where a kernel runs, in words."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.tuner.report.text import format_threads


@dataclass(frozen=True)
class Location:
    """A device and, where that is a choice of the caller's, so many of its threads."""

    device_key: str
    threads: int
    """As the database keeps it: 0 where a kernel always takes the whole device."""

    def __str__(self) -> str:
        return f"{format_threads(self.threads)} on {self.device_key}" if self.threads else f"on {self.device_key}"
