"""What this machine's CPU is: the facts that name a device and decide which archs run on it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_MOST_CACHE_PER_CORE = 64 << 20
"""No CPU of today has more last-level cache for each of its cores."""
_UNKNOWN_CACHE_BYTES = 32 << 20
"""Of the last-level cache, where the system does not tell."""


@dataclass(frozen=True)
class CpuInfo:
    """One CPU model with its caches; sizes in bytes, 0 where the system does not tell."""

    name: str
    machine: str
    vendor: str
    model: str
    """Vendor's own numbering: family and model on x86, implementer and part on Arm."""
    features: frozenset[str]
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    memory_bytes: int
    cores: int = 1
    """Of the whole machine, whether or not this process may use them."""

    @property
    def own_cache_bytes(self) -> int:
        """Of the last-level cache, what this machine's cores can have for themselves.

        A virtual machine with two cores shows the hundreds of MB of its host, which many others use as well: beyond
        twice its own share, more data misses no more often, and only takes memory and time to prepare.
        """
        return min(self.l3_bytes or self.l2_bytes or _UNKNOWN_CACHE_BYTES, self.cores * _MOST_CACHE_PER_CORE)

    @property
    def key(self) -> str:
        """Identifies the CPU model: kernels measured under one key are not served under another."""
        caches = f"{self.l1d_bytes >> 10}k-{self.l2_bytes >> 10}k-{self.l3_bytes >> 10}k"
        return f"{self.machine}/{self.vendor}-{self.model}/{caches}"


@cache
def read_cpu_info() -> CpuInfo:
    """Facts about this machine's CPU, read once per process."""
    fields = _proc_cpuinfo()
    machine = platform.machine()
    if machine == "aarch64":
        vendor = fields.get("CPU implementer", "unknown")
        model = fields.get("CPU part", "unknown")
    else:
        vendor = fields.get("vendor_id", platform.processor() or "unknown")
        model = f"{fields.get('cpu family', '0')}-{fields.get('model', '0')}"
    features = fields.get("flags") or fields.get("Features") or ""
    return CpuInfo(
        name=fields.get("model name", f"{vendor} {model}").strip(),
        machine=machine,
        vendor=vendor,
        model=model,
        features=frozenset(features.split()),
        l1d_bytes=_cache_bytes("1", "Data"),
        l2_bytes=_cache_bytes("2", "Unified"),
        l3_bytes=_cache_bytes("3", "Unified"),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=os.cpu_count() or 1,
    )


def _proc_cpuinfo() -> dict[str, str]:
    """First processor's fields of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _cache_bytes(level: str, kind: str) -> int:
    """Size of one cache of the first core."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "level").read_text().strip() == level and (index / "type").read_text().strip() == kind:
            match = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip())
            if match:
                return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    return 0
