"""Every kind of target by the family of archs that it is for. A target is imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from tilewright.codegen.hardware.archs import Arch
from tilewright.errors import TilewrightError
from tilewright.tuner.targets.base import Target, Wishes

_TARGETS: dict[str, tuple[str, ...]] = {
    "cpu": ("tilewright.tuner.targets.cpu:CpuTarget",),
    "cuda": (
        "tilewright.tuner.targets.device:DeviceTarget",
        "tilewright.tuner.targets.predicted:PredictedTarget",
    ),
    "hip": ("tilewright.tuner.targets.predicted:PredictedTarget",),
}
"""Module and class of the targets of each family; the first that finds a device is taken."""


def find_target(arch: Arch, wishes: Wishes, warn: Callable[[str], None]) -> Target:
    """The target for ``arch`` that is meant.

    Args:
        arch: to tune for.
        wishes: what the user said about the device.
        warn: told of what is not as it was asked for, but can go on.

    Raises:
        TilewrightError: for wishes that cannot be granted.

    """
    for name in _TARGETS[arch.family]:
        module, _, kind = name.partition(":")
        found: Target | None = getattr(importlib.import_module(module), kind).find(arch, wishes, warn)
        if found is not None:
            return found
    raise TilewrightError(f"nothing here can tune for {arch.name}; tune on such a machine, or use --arch native")
