"""GPU products, as data with sources: what predictions, waves and rooflines are computed from.

Peaks are dense (no structured sparsity), in TFLOP/s (TOP/s for int8), with sums in fp32. ``boost_clock_mhz`` is the
clock to which these peaks belong; where a vendor calls another clock "boost", ours is derived from the bf16 peak.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tilewright.codegen.hardware.archs import GPU_ARCHS, GpuArch
from tilewright.errors import TilewrightError


@dataclass(frozen=True)
class Device:
    """One product of an arch. What a multiprocessor holds is the arch's."""

    name: str
    arch_name: str
    sm_count: int
    """Multiprocessors that are enabled: SMs, or CUs."""
    boost_clock_mhz: int
    memory_bytes: int
    bandwidth_gbps: float
    """Peak of the device memory, in GB/s (10^9)."""
    l2_bytes: int
    peak_tflops: Mapping[str, float]
    """By type of the operands of the matrix unit; ``fp32`` is the peak without it."""
    sources: Mapping[str, str]
    """Where each field is from, by field; what is not named is from ``sources["*"]``."""

    @property
    def key(self) -> str:
        """Identifies the product, in commands and in the database: ``h100-sxm``."""
        return _slug(self.name)

    @property
    def arch(self) -> GpuArch:
        """Arch that it executes."""
        return GPU_ARCHS[self.arch_name]

    def source(self, field: str) -> str:
        """Where ``field`` is from."""
        return self.sources.get(field, self.sources["*"])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _matrix(bf16: float, **others: float) -> dict[str, float]:
    """Peaks of a device whose bf16 and fp16 are equally fast."""
    return {"fp16": bf16, "bf16": bf16, **others}


_MIB = 1 << 20
_GIB = 1 << 30
_A100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper (V1.0), tables 1 and 4"
_A100_SHEET = "NVIDIA A100 Tensor Core GPU datasheet (2021), specifications"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper (V2.1), appendix A"
_ADA = "NVIDIA Ada GPU Architecture whitepaper (V2.1), appendix A"
_L40S_SHEET = "NVIDIA L40S datasheet (2023), specifications"
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper (V1.04), tables 2 and 3"
_H100_SHEET = "NVIDIA H100 Tensor Core GPU datasheet (2024), specifications; its sparse peaks halved"
_H200_SHEET = "NVIDIA H200 Tensor Core GPU datasheet (2024), specifications; its sparse peaks halved"
_BLACKWELL = "NVIDIA Blackwell Architecture technical brief (2024), table of systems; its sparse peaks halved"
_ULTRA = "NVIDIA HGX and GB300 NVL72 product pages (2025), specifications divided by GPUs; sparse peaks halved"
_ULTRA_FP4 = "NVIDIA technical blog 'Inside NVIDIA Blackwell Ultra' (2025), dense NVFP4"
_DEVICE_QUERY = "as devices report themselves (cudaGetDeviceProperties), published by Chips and Cheese (2025)"
_DEVICE_REPORTS = "as devices report themselves (cudaGetDeviceProperties), from logs published by their users"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper (V1.1), appendix A"
_RTX_PRO = "NVIDIA RTX PRO Blackwell GPU Architecture whitepaper (V1.0), appendix A"
_CDNA3 = "AMD CDNA 3 white paper (2023) and AMD Instinct MI300X data sheet"
_CDNA4 = "AMD CDNA 4 white paper (2025) and AMD Instinct MI355X data sheet"
_DERIVED_CLOCK = "derived: the bf16 peak over multiprocessors and operations per clock of one"

_A100_PEAK = _matrix(312.0, tf32=156.0, int8=624.0, fp32=19.5)
_HOPPER_PEAK = _matrix(989.4, fp8_e4m3=1978.9, int8=1978.9, tf32=494.7, fp32=66.9)
_B200_PEAK = _matrix(2250.0, fp8_e4m3=4500.0, mxfp4=9000.0, nvfp4=9000.0, int8=4500.0, tf32=1125.0, fp32=75.0)
_GB200_PEAK = _matrix(2500.0, fp8_e4m3=5000.0, mxfp4=10000.0, nvfp4=10000.0, int8=5000.0, tf32=1250.0, fp32=80.0)
_A100_SOURCES = {"*": _A100, "memory_bytes": _A100_SHEET, "bandwidth_gbps": _A100_SHEET}
_HOPPER_SOURCES = {"*": _H100_SHEET, "sm_count": _HOPPER, "l2_bytes": _HOPPER, "boost_clock_mhz": _DERIVED_CLOCK}

_DEVICES = (
    Device("A100 SXM 80GB", "sm_80", 108, 1410, 80 * _GIB, 2039, 40 * _MIB, _A100_PEAK, _A100_SOURCES),
    Device("A100 SXM 40GB", "sm_80", 108, 1410, 40 * _GIB, 1555, 40 * _MIB, _A100_PEAK, _A100_SOURCES),
    Device("A100 PCIe 80GB", "sm_80", 108, 1410, 80 * _GIB, 1935, 40 * _MIB, _A100_PEAK, _A100_SOURCES),
    Device("A100 PCIe 40GB", "sm_80", 108, 1410, 40 * _GIB, 1555, 40 * _MIB, _A100_PEAK, _A100_SOURCES),
    Device(
        *("A10", "sm_86", 72, 1695, 24 * _GIB, 600, 6 * _MIB),
        _matrix(125.0, tf32=62.5, int8=250.0, fp32=31.2),
        {"*": "NVIDIA A10 datasheet (2021), specifications", "l2_bytes": _GA102, "sm_count": _GA102},
    ),
    Device(
        *("RTX 3090", "sm_86", 82, 1695, 24 * _GIB, 936, 6 * _MIB),
        _matrix(71.0, tf32=35.6, int8=284.0, fp32=35.6),
        {"*": _GA102},
    ),
    Device(
        *("L40S", "sm_89", 142, 2520, 48 * _GIB, 864, 96 * _MIB),
        _matrix(362.1, fp8_e4m3=733.0, int8=733.0, tf32=183.2, fp32=91.6),
        {"*": _L40S_SHEET, "sm_count": _ADA, "l2_bytes": _ADA, "boost_clock_mhz": _ADA},
    ),
    Device(
        *("RTX 4090", "sm_89", 128, 2520, 24 * _GIB, 1008, 72 * _MIB),
        _matrix(165.2, fp8_e4m3=330.3, int8=660.6, tf32=82.6, fp32=82.6),
        {"*": _ADA},
    ),
    Device("H100 SXM", "sm_90", 132, 1830, 80 * _GIB, 3350, 50 * _MIB, _HOPPER_PEAK, _HOPPER_SOURCES),
    Device(
        *("H100 PCIe", "sm_90", 114, 1620, 80 * _GIB, 2039, 50 * _MIB),
        _matrix(756.0, fp8_e4m3=1513.0, int8=1513.0, tf32=378.0, fp32=51.2),
        {"*": _HOPPER, "boost_clock_mhz": _DERIVED_CLOCK},
    ),
    Device(
        *("H200", "sm_90", 132, 1830, 141 * 10**9, 4800, 50 * _MIB),
        _HOPPER_PEAK,
        {**_HOPPER_SOURCES, "memory_bytes": _H200_SHEET, "bandwidth_gbps": _H200_SHEET, "peak_tflops": _H200_SHEET},
    ),
    Device(
        *("B200", "sm_100", 148, 1856, 180 * 10**9, 8000, 126 * _MIB),
        _B200_PEAK,
        {"*": _BLACKWELL, "sm_count": _DEVICE_QUERY, "l2_bytes": _DEVICE_QUERY, "boost_clock_mhz": _DERIVED_CLOCK},
    ),
    Device(
        *("GB200", "sm_100", 152, 2008, 186 * 10**9, 8000, 126 * _MIB),
        _GB200_PEAK,
        {"*": _BLACKWELL, "sm_count": _DEVICE_REPORTS, "l2_bytes": _DEVICE_REPORTS, "boost_clock_mhz": _DERIVED_CLOCK},
    ),
    Device(
        *("B300", "sm_103", 148, 1856, 270 * 10**9, 8000, 126 * _MIB),
        {**_B200_PEAK, "mxfp4": 13500.0, "nvfp4": 13500.0, "int8": 150.0},
        {"*": _ULTRA, "sm_count": _DEVICE_REPORTS, "l2_bytes": _DEVICE_REPORTS, "boost_clock_mhz": _DERIVED_CLOCK},
    ),
    Device(
        *("GB300", "sm_103", 152, 2008, 279 * 10**9, 8000, 126 * _MIB),
        {**_GB200_PEAK, "mxfp4": 15000.0, "nvfp4": 15000.0, "int8": 165.0},
        {
            "*": _ULTRA,
            "peak_tflops": _ULTRA_FP4,
            "sm_count": _DEVICE_REPORTS,
            "l2_bytes": _DEVICE_REPORTS,
            "boost_clock_mhz": _DERIVED_CLOCK,
        },
    ),
    Device(
        *("RTX PRO 6000 Blackwell", "sm_120", 188, 2617, 96 * _GIB, 1792, 128 * _MIB),
        _matrix(503.8, fp8_e4m3=1007.6, mxfp4=2015.2, nvfp4=2015.2, int8=1007.6, tf32=251.9, fp32=126.0),
        {"*": _RTX_PRO},
    ),
    Device(
        *("RTX 5090", "sm_120", 170, 2407, 32 * _GIB, 1792, 96 * _MIB),
        _matrix(209.5, fp8_e4m3=419.0, mxfp4=1676.0, nvfp4=1676.0, int8=838.0, tf32=104.8, fp32=104.8),
        {"*": _RTX_BLACKWELL},
    ),
    Device(
        *("MI300X", "gfx942", 304, 2100, 192 * 10**9, 5300, 32 * _MIB),
        _matrix(1307.4, fp8_e4m3=2614.9, int8=2614.9, tf32=653.7, fp32=163.4),
        {"*": _CDNA3},
    ),
    Device(
        *("MI355X", "gfx950", 256, 2400, 288 * 10**9, 8000, 32 * _MIB),
        _matrix(2516.6, fp8_e4m3=5033.2, mxfp4=10066.3, int8=5033.2, fp32=157.3),
        {"*": _CDNA4},
    ),
)

DEVICES: dict[str, Device] = {device.key: device for device in _DEVICES}
_BY_LETTERS = {key.replace("-", ""): device for key, device in DEVICES.items()}
"""By key; the first of an arch stands for it where no device is named."""


def default_device(arch: GpuArch) -> Device:
    """The device that is meant where only the arch is named."""
    return next(device for device in DEVICES.values() if device.arch_name == arch.name)


def find_device(name: str | None, arch: GpuArch, warn: Callable[[str], None]) -> Device:
    """Device of ``arch`` by name or key; with no name, the arch's default.

    An unknown device is taken for the arch's default one, and ``warn`` told so.

    Raises:
        TilewrightError: for a device that is known to have another arch.

    """
    default = default_device(arch)
    if name is None:
        return default
    device = _BY_LETTERS.get(_slug(name.removeprefix("NVIDIA ").removeprefix("AMD ")).replace("-", ""))
    if device is None:
        known = ", ".join(d.key for d in DEVICES.values() if d.arch_name == arch.name)
        warn(f"device {name!r} is not known, so {default.name} stands for {arch.name}; known of that arch: {known}")
        return default
    if device.arch_name != arch.name:
        raise TilewrightError(
            f"device {device.name} is {device.arch_name}, not {arch.name}; use --arch {device.arch_name}"
        )
    return device
