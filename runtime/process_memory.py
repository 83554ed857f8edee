"""How much memory this process holds, and held at the most."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Of this process, in bytes; None where the system does not tell."""

    resident_bytes: int | None
    """In main memory now."""
    peak_bytes: int | None
    """The most there ever was."""

    @classmethod
    def now(cls) -> Memory:
        """What the system reports now."""
        if _STATUS.exists():
            fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
            return cls(*(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")))
        if sys.platform == "win32":
            return cls(None, None)
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return cls(None, peak if sys.platform == "darwin" else peak * 1024)

    def __str__(self) -> str:
        return f"{megabytes(self.resident_bytes)} resident, {megabytes(self.peak_bytes)} at the peak"


def megabytes(size: int | None) -> str:
    """``size`` bytes for people."""
    return "unknown" if size is None else f"{size / 1e6:.0f} MB"
