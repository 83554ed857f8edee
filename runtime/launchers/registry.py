"""Every launcher by the kind of artifact that it loads; imported when it is first asked for."""

from __future__ import annotations

import importlib
from functools import cache

from tilewright.runtime.launchers.base import KernelRefused, Launcher

_LAUNCHERS = {
    "host_so": "tilewright.runtime.launchers.host_so:HostLauncher",
    "cubin": "tilewright.runtime.launchers.cuda.launcher:CudaLauncher",
}
"""Module and class of each kind's launcher."""


@cache
def find_launcher(kind: str) -> Launcher:
    """The launcher of a kind of artifact.

    Raises:
        KernelRefused: for a kind that this release cannot launch.

    """
    if kind not in _LAUNCHERS:
        raise KernelRefused(
            f"nothing here launches {kind!r} artifacts, only {', '.join(_LAUNCHERS)}; tune for this machine"
        )
    module, _, name = _LAUNCHERS[kind].partition(":")
    launcher: Launcher = getattr(importlib.import_module(module), name)()
    return launcher
