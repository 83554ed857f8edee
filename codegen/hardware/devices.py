"""Which GPU is meant, and which is there: a product found by its name, or by what its driver says of itself.

A product decides which plans are served and what predictions are made from, so none is ever taken for another: a name
that is not known is refused, and a device that is there without being in the table (another product, a slice of one by
MIG, a virtual one) gets a description of its own, from its driver's attributes, under a key of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import SequenceMatcher

from tilewright.codegen.hardware.archs import GPU_ARCHS, GpuArch
from tilewright.codegen.hardware.products import PRODUCTS, Device, slug
from tilewright.errors import TilewrightError

__all__ = [
    "DEVICES",
    "Device",
    "DriverFacts",
    "default_device",
    "describe_device",
    "device_key",
    "find_device",
    "match_device",
]

DEVICES: dict[str, Device] = {device.key: device for device in PRODUCTS}
"""By key."""


def _letters(name: str) -> str:
    """A name as it is compared: whoever sold it, spaces, hyphens and capitals do not count."""
    return slug(name.strip().removeprefix("NVIDIA ").removeprefix("AMD ")).replace("-", "")


_BY_LETTERS = {
    _letters(name): device for device in PRODUCTS for name in (*device.driver_names, device.name)
}  # of two that share a spelling, a product's own name counts: it comes last
_BY_DRIVER_NAME = {(device.arch_name, _letters(name)): device for device in PRODUCTS for name in device.driver_names}
_LEAST_MEMORY, _MOST_MEMORY = 0.88, 1.01
"""Share of a product's memory that its driver reports: ECC and the driver itself take up to 9 % of small ones."""
_GIB = 1 << 30
_LARGE_GIB = 32


@dataclass(frozen=True)
class DriverFacts:
    """What the driver says of an NVIDIA device that is there; 0 where it does not say."""

    name: str
    """As ``cuDeviceGetName`` gives it."""
    capability: tuple[int, int]
    sm_count: int
    memory_bytes: int
    clock_khz: int = 0
    """Highest of the multiprocessors."""
    memory_clock_khz: int = 0
    memory_bus_bits: int = 0
    l2_bytes: int = 0


def default_device(arch: GpuArch) -> Device:
    """The device that is meant where only the arch is named."""
    return next(device for device in PRODUCTS if device.arch_name == arch.name)


def find_device(name: str | None, arch: GpuArch) -> Device:
    """Device of ``arch`` by its name, its key, or what its driver calls it; with no name, the arch's default.

    Raises:
        TilewrightError: for a device that is not in the table, or that has another arch.

    """
    if name is None:
        return default_device(arch)
    device = _BY_LETTERS.get(_letters(name))
    if device is None:
        near = _nearest(name, arch)
        known = ", ".join(each.key for each in PRODUCTS if each.arch_name == arch.name)
        raise TilewrightError(
            f"device {name!r} is not known; the nearest name is {near.key} ({near.arch_name}), and those of "
            f"{arch.name} are {known}"
        )
    if device.arch_name != arch.name:
        raise TilewrightError(
            f"device {device.name} is {device.arch_name}, not {arch.name}; use --arch {device.arch_name}"
        )
    return device


def _nearest(name: str, arch: GpuArch) -> Device:
    """The product whose name is most like ``name``; of two that are nearly as much like it, that of ``arch``."""

    def likeness(letters: str) -> float:
        own = _BY_LETTERS[letters].arch_name == arch.name
        return SequenceMatcher(None, _letters(name), letters).ratio() + own / 10

    return _BY_LETTERS[max(_BY_LETTERS, key=likeness)]


def match_device(name: str, capability: tuple[int, int], sm_count: int, memory_bytes: int) -> Device | None:
    """The product that a device is; None where it is none of the table, and for a part of one.

    Args:
        name: as its driver gives it: ``NVIDIA H100 80GB HBM3``.
        capability: major and minor of its compute capability.
        sm_count: its multiprocessors. Slices by MIG have fewer.
        memory_bytes: all of its memory. Slices, and cards with other memory chips, have less or more.

    """
    device = _BY_DRIVER_NAME.get((_arch_name(capability), _letters(name)))
    if device is None or device.sm_count != sm_count:
        return None
    return device if _LEAST_MEMORY <= memory_bytes / device.memory_bytes <= _MOST_MEMORY else None


def device_key(name: str, capability: tuple[int, int], sm_count: int, memory_bytes: int) -> str:
    """Key of a device that is there: its product's, or one that no product has."""
    device = match_device(name, capability, sm_count, memory_bytes)
    return slug(_own_name(name, sm_count, memory_bytes)) if device is None else device.key


def describe_device(facts: DriverFacts) -> Device:
    """What is known of a device that is there: its product, or what follows from its driver's attributes.

    The attributes tell multiprocessors, clocks, memory and its bus. Operations per clock of a multiprocessor are those
    of a product of the arch (GeForce cards have fewer); each figure says in ``sources`` where it is from.

    Raises:
        TilewrightError: when it is of an arch that nothing is generated for.

    """
    device = match_device(facts.name, facts.capability, facts.sm_count, facts.memory_bytes)
    return device or _derived(facts)


def _derived(facts: DriverFacts) -> Device:
    arch = GPU_ARCHS.get(_arch_name(facts.capability))
    if arch is None:
        known = ", ".join(each.name for each in GPU_ARCHS.values() if each.family == "cuda")
        raise TilewrightError(
            f"{facts.name} is {_arch_name(facts.capability)}, for which nothing is generated; supported are {known}"
        )
    like = _alike(facts.name, arch)
    sources = {"*": "its driver's attributes"}
    clock_mhz, l2_bytes = facts.clock_khz // 1000, facts.l2_bytes
    bandwidth_gbps = 2 * facts.memory_clock_khz * facts.memory_bus_bits / 8 / 1e6  # both edges of a clock carry data
    if not clock_mhz:
        clock_mhz = like.boost_clock_mhz
        sources["boost_clock_mhz"] = f"assumed: its driver does not say, and {like.name} has it"
    if not l2_bytes:
        l2_bytes = like.l2_bytes * facts.sm_count // like.sm_count
        sources["l2_bytes"] = f"assumed: its driver does not say, and {like.name} has as much for a multiprocessor"
    if not bandwidth_gbps:
        bandwidth_gbps = like.bandwidth_gbps * facts.sm_count / like.sm_count
        sources["bandwidth_gbps"] = (
            f"assumed: its driver does not say, and {like.name} has as much for a multiprocessor"
        )
    share = facts.sm_count * clock_mhz / (like.sm_count * like.boost_clock_mhz)
    sources["peak_tflops"] = f"derived: multiprocessors and clock, with operations per clock as on {like.name}"
    return Device(
        _own_name(facts.name, facts.sm_count, facts.memory_bytes),
        arch.name,
        facts.sm_count,
        clock_mhz,
        facts.memory_bytes,
        bandwidth_gbps,
        l2_bytes,
        {dtype: share * peak for dtype, peak in like.peak_tflops.items()},
        sources,
    )


def _alike(name: str, arch: GpuArch) -> Device:
    """The product of ``arch`` whose multiprocessors a device that is in no table most likely has."""
    of_arch = [device for device in PRODUCTS if device.arch_name == arch.name]
    return next((each for each in of_arch if _is_geforce(name) == _is_geforce(*each.driver_names)), of_arch[0])


def _is_geforce(*names: str) -> bool:
    return any("GeForce" in name for name in names)


def _own_name(name: str, sm_count: int, memory_bytes: int) -> str:
    """Name of a device that is in no table; slices of one product differ in it."""
    return f"{name.strip().removeprefix('NVIDIA ')} ({sm_count} SMs, {_nominal_gib(memory_bytes):g} GiB)"


def _nominal_gib(memory_bytes: int) -> float:
    """Memory as it is sold, so that a key does not change with what a driver or ECC keep of it.

    They keep up to 9 % of small memories and less of large ones, which are sold in smaller steps.
    """
    gib = max(memory_bytes, 1) / _GIB
    steps = 4 if gib < _LARGE_GIB else 8
    step = 2.0 ** math.floor(math.log2(gib)) / steps
    return math.ceil(gib / step) * step


def _arch_name(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
