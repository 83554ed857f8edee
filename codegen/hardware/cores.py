"""How many cores this process can keep busy: those that it may run on, and what a cgroup's quota leaves of them.

Containers are given half a core or six by a quota: their processes see, and may run on, every core of the machine, and
are all stopped for the rest of each period (0.1 s) once the quota is used up. A thread per core would only wait.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SELF = Path("/proc/self")


@dataclass(frozen=True)
class Cores:
    """What this process may use."""

    allowed: int
    """Cores that it may run on: affinity, which holds what a cpuset allows."""
    quota: float | None
    """Cores' worth of time in each period, the least of all groups that it is in; None: as much as there is."""

    @property
    def usable(self) -> int:
        """Threads that can run at once all the time: 1.5 cores' worth of time keeps one busy. At least 1."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, math.floor(self.quota)))

    def __str__(self) -> str:
        cores = f"{self.usable} {'core' if self.usable == 1 else 'cores'}"
        if self.quota is None or self.quota >= self.allowed:
            return cores
        return f"{cores} of {self.allowed}, for a cgroup's quota allows the time of {self.quota:.3g}"


def usable_cores() -> int:
    """Cores that this process can keep busy: affinity and a cgroup's quota counted, rounded down, at least 1."""
    return cores().usable


def cores(process: Path = _SELF) -> Cores:
    """What the process whose folder in /proc is ``process`` may use; affinity is this one's."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Cores(allowed, min(_quotas(process), default=None))


def _quotas(process: Path) -> Iterator[float]:
    """Of each group that the process is in, its own and those above it, of either version of cgroups."""
    try:
        groups = (process / "cgroup").read_text(errors="surrogateescape").splitlines()
        mounts = list(_mounts((process / "mountinfo").read_text(errors="surrogateescape")))
    except OSError:  # another system, or a /proc that is not there
        return
    for line in groups:
        number, controllers, path = line.split(":", 2)
        for mount in mounts:
            if number == "0" and not controllers:
                belongs, read = mount.kind == "cgroup2", _quota_v2
            else:
                belongs, read = mount.kind == "cgroup" and "cpu" in mount.options, _quota_v1
                belongs = belongs and "cpu" in controllers.split(",")
            if belongs:
                for folder in mount.folders(path):
                    if (quota := read(folder)) is not None:
                        yield quota


@dataclass(frozen=True)
class _Mount:
    """A hierarchy of groups that can be looked at."""

    kind: str
    root: str
    """The group that is seen at ``point``; a container's own is often all that it sees."""
    point: Path
    options: tuple[str, ...]

    def folders(self, path: str) -> Iterator[Path]:
        """Of the group ``path`` and of those above it, as far as they can be seen."""
        inside = os.path.relpath(path, self.root)
        folder = self.point if inside.startswith("..") else self.point / inside
        yield folder
        while folder != self.point:
            folder = folder.parent
            yield folder


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if (kind := after.split(" ", 1)[0]) in ("cgroup", "cgroup2"):
            root, point = map(_unescaped, before.split(" ")[3:5])
            yield _Mount(kind, root, Path(point), tuple(after.split(" ")[-1].split(",")))


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _quota_v2(folder: Path) -> float | None:
    return _share(*_words(folder / "cpu.max"))


def _quota_v1(folder: Path) -> float | None:
    return _share(*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us"))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # the root of all groups has no limits
        return []


def _share(quota_us: str = "max", period_us: str = "100000") -> float | None:
    """None for ``max`` (version 2) and -1 (version 1)."""
    if not quota_us.isdigit() or not period_us.isdigit() or int(period_us) == 0:
        return None
    return int(quota_us) / int(period_us)
