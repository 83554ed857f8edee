"""GPU products, as data with sources: what predictions, waves and rooflines are computed from.

Peaks are dense (no structured sparsity), in TFLOP/s (TOP/s for int8), with sums in fp32. ``boost_clock_mhz`` is the
clock to which these peaks belong; where a vendor calls another clock "boost", ours is derived from the bf16 peak.
Memory is counted in GiB, which data sheets write GB: drivers report that, less what they keep for themselves.

What a vendor did not publish is derived from what it did, and says so in ``sources``; what cannot be derived is left
out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tilewright.codegen.hardware.archs import GPU_ARCHS, GpuArch


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
    driver_names: tuple[str, ...] = ()
    """What the driver calls it, without ``NVIDIA``; empty for one that is in no table."""

    @property
    def key(self) -> str:
        """Identifies the product, in commands and in the database: ``h100-sxm``."""
        return slug(self.name)

    @property
    def arch(self) -> GpuArch:
        """Arch that it executes."""
        return GPU_ARCHS[self.arch_name]

    def source(self, field: str) -> str:
        """Where ``field`` is from."""
        return self.sources.get(field, self.sources["*"])


def slug(name: str) -> str:
    """A name as a key: small letters and digits, with a hyphen for whatever else stands between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _matrix(bf16: float, **others: float) -> dict[str, float]:
    """Peaks of a device whose bf16 and fp16 are equally fast."""
    return {"fp16": bf16, "bf16": bf16, **others}


def _per_clock(sm_count: int, clock_mhz: int, bf16: int, **others: int) -> dict[str, float]:
    """Peaks from operations per clock of one multiprocessor."""
    return {dtype: sm_count * clock_mhz * each / 1e6 for dtype, each in _matrix(bf16, **others).items()}


def _pro_blackwell(sm_count: int, clock_mhz: int) -> dict[str, float]:
    """Peaks of a workstation's Blackwell: its multiprocessors are those of the RTX PRO 6000."""
    return _per_clock(sm_count, clock_mhz, 1024, fp8_e4m3=2048, mxfp4=4096, nvfp4=4096, int8=2048, tf32=512, fp32=256)


_MIB = 1 << 20
_GIB = 1 << 30
_A100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper (V1.0), tables 1 and 4"
_A100_SHEET = "NVIDIA A100 Tensor Core GPU datasheet (2021), specifications"
_A800_SHEET = "NVIDIA A800 datasheet (2022): an A100 with slower links"
_A30_SHEET = "NVIDIA A30 Tensor Core GPU datasheet (2021), specifications"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper (V2.1), appendix A"
_A40_SHEET = "NVIDIA A40 datasheet (2021), specifications; its sparse peaks halved"
_ADA = "NVIDIA Ada GPU Architecture whitepaper (V2.1), appendix A"
_L40S_SHEET = "NVIDIA L40S datasheet (2023), specifications"
_L40_SHEET = "NVIDIA L40 datasheet (2022), specifications; its sparse peaks halved"
_L20_SHEET = "NVIDIA L20 data sheet, as quoted by the press (2023)"
_L4_SHEET = "NVIDIA L4 datasheet (2023), specifications; its sparse peaks halved"
_RTX6000_ADA = "NVIDIA RTX 6000 Ada Generation datasheet (2023), specifications; its sparse peaks halved"
_RTX4090D = "NVIDIA GeForce RTX 4090 D product page (2023)"
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper (V1.04), tables 2 and 3"
_H100_SHEET = "NVIDIA H100 Tensor Core GPU datasheet (2024), specifications; its sparse peaks halved"
_H200_SHEET = "NVIDIA H200 Tensor Core GPU datasheet (2024), specifications; its sparse peaks halved"
_H800_SHEET = "NVIDIA H800 datasheet (2023): an H100 with slower links and less fp64"
_GH200_SHEET = "NVIDIA GH200 Grace Hopper Superchip datasheet (2024), specifications; its sparse peaks halved"
_H20_SHEET = "NVIDIA H20 preliminary data sheet, as quoted by the press (2023)"
_BLACKWELL = "NVIDIA Blackwell Architecture technical brief (2024), table of systems; its sparse peaks halved"
_ULTRA = "NVIDIA HGX and GB300 NVL72 product pages (2025), specifications divided by GPUs; sparse peaks halved"
_ULTRA_FP4 = "NVIDIA technical blog 'Inside NVIDIA Blackwell Ultra' (2025), dense NVFP4"
_DEVICE_QUERY = "as devices report themselves (cudaGetDeviceProperties), published by Chips and Cheese (2025)"
_DEVICE_REPORTS = "as devices report themselves (cudaGetDeviceProperties), from logs published by their users"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper (V1.1), appendix A"
_RTX_BLACKWELL_80 = "NVIDIA RTX Blackwell GPU Architecture whitepaper (V1.1), appendices B and C"
_RTX_PRO = "NVIDIA RTX PRO Blackwell GPU Architecture whitepaper (V1.0), appendix A"
_RTX_PRO_SERVER = "NVIDIA RTX PRO 6000 Blackwell Server Edition datasheet (2025), specifications"
_RTX_PRO_5000 = "NVIDIA RTX PRO 5000 Blackwell product page (2025), specifications"
_RTX_PRO_4500 = "NVIDIA RTX PRO 4500 Blackwell product page (2025), specifications"
_CATALOGUES = "as catalogues of graphics cards list it (2025)"
_SPARK = "NVIDIA DGX Spark product page and hardware overview (2025)"
_SPARK_PEAKS = (
    "fp4 of the NVIDIA DGX Spark product page, its sparse peak halved; fp32 as NVIDIA told Hot Chips (2025); bf16 and "
    "fp8 at half the rate of fp4, as users measured their instructions, and int8 taken to be as fast as fp8"
)
_THOR = "NVIDIA Jetson T5000 data sheet (2025), specifications; its sparse peaks halved"
_CDNA3 = "AMD CDNA 3 white paper (2023) and AMD Instinct MI300X data sheet"
_MI325X = "AMD Instinct MI325X data sheet (2024)"
_CDNA4 = "AMD CDNA 4 white paper (2025) and AMD Instinct MI355X data sheet"
_MI350X = "AMD CDNA 4 white paper (2025) and AMD Instinct MI350X data sheet"
_DERIVED_CLOCK = "derived: the bf16 peak over multiprocessors and operations per clock of one"
_CLOCK_OF_FP32 = "derived: the fp32 peak over multiprocessors and operations per clock of one"
_CLOCK_OF_FP4 = "derived: the fp4 peak over multiprocessors and operations per clock of one"
_PRO_6000_PEAKS = "derived: multiprocessors and clock, with operations per clock as on the RTX PRO 6000 Blackwell"

_A100_PEAK = _matrix(312.0, tf32=156.0, int8=624.0, fp32=19.5)
_HOPPER_PEAK = _matrix(989.4, fp8_e4m3=1978.9, int8=1978.9, tf32=494.7, fp32=66.9)
_NVL_PEAK = _matrix(835.5, fp8_e4m3=1670.5, int8=1670.5, tf32=417.5, fp32=60.0)
_H20_PEAK = _matrix(148.0, fp8_e4m3=296.0, int8=296.0, tf32=74.0, fp32=44.0)
_B200_PEAK = _matrix(2250.0, fp8_e4m3=4500.0, mxfp4=9000.0, nvfp4=9000.0, int8=4500.0, tf32=1125.0, fp32=75.0)
_GB200_PEAK = _matrix(2500.0, fp8_e4m3=5000.0, mxfp4=10000.0, nvfp4=10000.0, int8=5000.0, tf32=1250.0, fp32=80.0)
_MI300X_PEAK = _matrix(1307.4, fp8_e4m3=2614.9, int8=2614.9, tf32=653.7, fp32=163.4)
_A100_SOURCES = {"*": _A100, "memory_bytes": _A100_SHEET, "bandwidth_gbps": _A100_SHEET}
_HOPPER_SOURCES = {"*": _H100_SHEET, "sm_count": _HOPPER, "l2_bytes": _HOPPER, "boost_clock_mhz": _DERIVED_CLOCK}


def _six_stacks(sheet: str) -> dict[str, str]:
    """Sources of a Hopper with all six stacks of memory, which brings more L2 than the whitepaper's H100 has."""
    return {"*": sheet, "sm_count": _DEVICE_REPORTS, "l2_bytes": _DEVICE_REPORTS, "boost_clock_mhz": _DERIVED_CLOCK}


_AMPERE = (
    Device(
        *("A100 SXM 80GB", "sm_80", 108, 1410, 80 * _GIB, 2039, 40 * _MIB, _A100_PEAK, _A100_SOURCES),
        driver_names=("A100-SXM4-80GB",),
    ),
    Device(
        *("A100 SXM 40GB", "sm_80", 108, 1410, 40 * _GIB, 1555, 40 * _MIB, _A100_PEAK, _A100_SOURCES),
        driver_names=("A100-SXM4-40GB",),
    ),
    Device(
        *("A100 PCIe 80GB", "sm_80", 108, 1410, 80 * _GIB, 1935, 40 * _MIB, _A100_PEAK, _A100_SOURCES),
        driver_names=("A100 80GB PCIe", "A100-PCIE-80GB"),
    ),
    Device(
        *("A100 PCIe 40GB", "sm_80", 108, 1410, 40 * _GIB, 1555, 40 * _MIB, _A100_PEAK, _A100_SOURCES),
        driver_names=("A100-PCIE-40GB",),
    ),
    Device(
        *("A800 SXM 80GB", "sm_80", 108, 1410, 80 * _GIB, 2039, 40 * _MIB, _A100_PEAK),
        {"*": _A800_SHEET, "l2_bytes": _A100, "boost_clock_mhz": _A100},
        driver_names=("A800-SXM4-80GB",),
    ),
    Device(
        *("A30", "sm_80", 56, 1440, 24 * _GIB, 933, 24 * _MIB),
        _matrix(165.0, tf32=82.0, int8=330.0, fp32=10.3),
        {"*": _A30_SHEET, "sm_count": _DEVICE_REPORTS, "l2_bytes": _DEVICE_REPORTS},
        driver_names=("A30",),
    ),
    Device(
        *("A10", "sm_86", 72, 1695, 24 * _GIB, 600, 6 * _MIB),
        _matrix(125.0, tf32=62.5, int8=250.0, fp32=31.2),
        {"*": "NVIDIA A10 datasheet (2021), specifications", "l2_bytes": _GA102, "sm_count": _GA102},
        driver_names=("A10",),
    ),
    Device(
        *("A40", "sm_86", 84, 1740, 48 * _GIB, 696, 6 * _MIB),
        _matrix(149.7, tf32=74.8, int8=299.3, fp32=37.4),
        {"*": _A40_SHEET, "l2_bytes": _GA102, "sm_count": _GA102},
        driver_names=("A40",),
    ),
    Device(
        *("RTX A6000", "sm_86", 84, 1800, 48 * _GIB, 768, 6 * _MIB),
        _matrix(154.8, tf32=77.4, int8=309.7, fp32=38.7),
        {"*": _GA102},
        driver_names=("RTX A6000",),
    ),
    Device(
        *("RTX 3090", "sm_86", 82, 1695, 24 * _GIB, 936, 6 * _MIB),
        _matrix(71.0, tf32=35.6, int8=284.0, fp32=35.6),
        {"*": _GA102},
        driver_names=("GeForce RTX 3090",),
    ),
    Device(
        *("RTX 3090 Ti", "sm_86", 84, 1860, 24 * _GIB, 1008, 6 * _MIB),
        _matrix(80.0, tf32=40.0, int8=320.0, fp32=40.0),
        {"*": _ADA},
        driver_names=("GeForce RTX 3090 Ti",),
    ),
)

_ADA_LOVELACE = (
    Device(
        *("L40S", "sm_89", 142, 2520, 48 * _GIB, 864, 96 * _MIB),
        _matrix(362.1, fp8_e4m3=733.0, int8=733.0, tf32=183.2, fp32=91.6),
        {"*": _L40S_SHEET, "sm_count": _ADA, "l2_bytes": _ADA, "boost_clock_mhz": _ADA},
        driver_names=("L40S",),
    ),
    Device(
        *("L40", "sm_89", 142, 2490, 48 * _GIB, 864, 96 * _MIB),
        _matrix(181.0, fp8_e4m3=362.1, int8=362.1, tf32=90.5, fp32=90.5),
        {"*": _L40_SHEET, "sm_count": _ADA, "l2_bytes": _ADA, "boost_clock_mhz": _DERIVED_CLOCK},
        driver_names=("L40",),
    ),
    Device(
        *("L20", "sm_89", 92, 2520, 48 * _GIB, 864, 96 * _MIB),
        _matrix(119.5, fp8_e4m3=239.0, int8=239.0, tf32=59.8, fp32=59.8),
        {"*": _L20_SHEET, "sm_count": _DEVICE_REPORTS, "l2_bytes": _DEVICE_REPORTS, "boost_clock_mhz": _DERIVED_CLOCK},
        driver_names=("L20",),
    ),
    Device(
        *("L4", "sm_89", 58, 2040, 24 * _GIB, 300, 48 * _MIB),
        _matrix(121.0, fp8_e4m3=242.5, int8=242.5, tf32=60.0, fp32=30.3),
        {"*": _L4_SHEET, "sm_count": _DEVICE_REPORTS, "l2_bytes": _DEVICE_REPORTS, "boost_clock_mhz": _DERIVED_CLOCK},
        driver_names=("L4",),
    ),
    Device(
        *("RTX 6000 Ada", "sm_89", 142, 2505, 48 * _GIB, 960, 96 * _MIB),
        _matrix(364.2, fp8_e4m3=728.5, int8=728.5, tf32=182.1, fp32=91.1),
        {"*": _RTX6000_ADA, "l2_bytes": _ADA, "boost_clock_mhz": _DERIVED_CLOCK},
        driver_names=("RTX 6000 Ada Generation",),
    ),
    Device(
        *("RTX 4090", "sm_89", 128, 2520, 24 * _GIB, 1008, 72 * _MIB),
        _matrix(165.2, fp8_e4m3=330.3, int8=660.6, tf32=82.6, fp32=82.6),
        {"*": _ADA},
        driver_names=("GeForce RTX 4090",),
    ),
    Device(
        *("RTX 4090 D", "sm_89", 114, 2520, 24 * _GIB, 1008, 72 * _MIB),
        _matrix(147.1, fp8_e4m3=294.2, int8=588.5, tf32=73.5, fp32=73.5),
        {
            "*": _RTX4090D,
            "l2_bytes": _DEVICE_REPORTS,
            "peak_tflops": f"int8 of the {_RTX4090D}, its sparse peak halved; others in proportion to the RTX 4090's",
        },
        driver_names=("GeForce RTX 4090 D",),
    ),
)

_HOPPERS = (
    Device(
        *("H100 SXM", "sm_90", 132, 1830, 80 * _GIB, 3350, 50 * _MIB, _HOPPER_PEAK, _HOPPER_SOURCES),
        driver_names=("H100 80GB HBM3",),
    ),
    Device(
        *("H100 PCIe", "sm_90", 114, 1620, 80 * _GIB, 2039, 50 * _MIB),
        _matrix(756.0, fp8_e4m3=1513.0, int8=1513.0, tf32=378.0, fp32=51.2),
        {"*": _HOPPER, "boost_clock_mhz": _DERIVED_CLOCK},
        driver_names=("H100 PCIe",),
    ),
    Device(
        *("H100 NVL", "sm_90", 132, 1545, 94 * _GIB, 3900, 60 * _MIB, _NVL_PEAK, _six_stacks(_H100_SHEET)),
        driver_names=("H100 NVL",),
    ),
    Device(
        *("H800 SXM", "sm_90", 132, 1830, 80 * _GIB, 3350, 50 * _MIB, _HOPPER_PEAK),
        {**_HOPPER_SOURCES, "*": _H800_SHEET},
        driver_names=("H800",),
    ),
    Device(
        *("H200", "sm_90", 132, 1830, 141 * _GIB, 4800, 60 * _MIB, _HOPPER_PEAK),
        {**_six_stacks(_H200_SHEET), "sm_count": _HOPPER},
        driver_names=("H200",),
    ),
    Device(
        *("H200 NVL", "sm_90", 132, 1545, 141 * _GIB, 4800, 60 * _MIB, _NVL_PEAK, _six_stacks(_H200_SHEET)),
        driver_names=("H200 NVL",),
    ),
    Device(
        *("GH200 96GB", "sm_90", 132, 1830, 96 * _GIB, 4000, 60 * _MIB, _HOPPER_PEAK, _six_stacks(_GH200_SHEET)),
        driver_names=("GH200 480GB",),
    ),
    Device(
        *("GH200 144GB", "sm_90", 132, 1830, 144 * _GIB, 4900, 60 * _MIB, _HOPPER_PEAK, _six_stacks(_GH200_SHEET)),
        driver_names=("GH200 144G HBM3e",),
    ),
    Device(
        *("H20", "sm_90", 78, 1853, 96 * _GIB, 4000, 60 * _MIB, _H20_PEAK, _six_stacks(_H20_SHEET)),
        driver_names=("H20",),
    ),
    Device(
        *("H20 141GB", "sm_90", 78, 1853, 141 * _GIB, 4800, 60 * _MIB, _H20_PEAK, _six_stacks(_H20_SHEET)),
        driver_names=("H20-3e",),
    ),
)

_BLACKWELLS = (
    Device(
        *("B200", "sm_100", 148, 1856, 180 * _GIB, 8000, 126 * _MIB),
        _B200_PEAK,
        {"*": _BLACKWELL, "sm_count": _DEVICE_QUERY, "l2_bytes": _DEVICE_QUERY, "boost_clock_mhz": _DERIVED_CLOCK},
        driver_names=("B200",),
    ),
    Device(
        *("GB200", "sm_100", 152, 2008, 186 * _GIB, 8000, 126 * _MIB),
        _GB200_PEAK,
        {"*": _BLACKWELL, "sm_count": _DEVICE_REPORTS, "l2_bytes": _DEVICE_REPORTS, "boost_clock_mhz": _DERIVED_CLOCK},
        driver_names=("GB200",),
    ),
    Device(
        *("B300", "sm_103", 148, 1856, 270 * _GIB, 8000, 126 * _MIB),
        {**_B200_PEAK, "mxfp4": 13500.0, "nvfp4": 13500.0, "int8": 150.0},
        {"*": _ULTRA, "sm_count": _DEVICE_REPORTS, "l2_bytes": _DEVICE_REPORTS, "boost_clock_mhz": _DERIVED_CLOCK},
        driver_names=("B300 SXM6 AC",),
    ),
    Device(
        *("GB300", "sm_103", 152, 2008, 279 * _GIB, 8000, 126 * _MIB),
        {**_GB200_PEAK, "mxfp4": 15000.0, "nvfp4": 15000.0, "int8": 165.0},
        {
            "*": _ULTRA,
            "peak_tflops": _ULTRA_FP4,
            "sm_count": _DEVICE_REPORTS,
            "l2_bytes": _DEVICE_REPORTS,
            "boost_clock_mhz": _DERIVED_CLOCK,
        },
        driver_names=("GB300",),
    ),
    Device(
        *("RTX PRO 6000 Blackwell", "sm_120", 188, 2617, 96 * _GIB, 1792, 128 * _MIB),
        _matrix(503.8, fp8_e4m3=1007.6, mxfp4=2015.2, nvfp4=2015.2, int8=1007.6, tf32=251.9, fp32=126.0),
        {"*": _RTX_PRO},
        driver_names=("RTX PRO 6000 Blackwell Workstation Edition",),
    ),
    Device(
        *("RTX PRO 6000 Blackwell Max-Q", "sm_120", 188, 2280, 96 * _GIB, 1792, 128 * _MIB),
        _pro_blackwell(188, 2280),
        {"*": _RTX_PRO},
        driver_names=("RTX PRO 6000 Blackwell Max-Q Workstation Edition",),
    ),
    Device(
        *("RTX PRO 6000 Blackwell Server", "sm_120", 188, 2493, 96 * _GIB, 1597, 128 * _MIB),
        _pro_blackwell(188, 2493),
        {
            "*": _RTX_PRO_SERVER,
            "l2_bytes": _RTX_PRO,
            "boost_clock_mhz": _CLOCK_OF_FP32,
            "peak_tflops": _PRO_6000_PEAKS,
        },
        driver_names=("RTX PRO 6000 Blackwell Server Edition",),
    ),
    *(
        Device(
            *(name, "sm_120", 110, 2290, memory_gib * _GIB, 1344, 96 * _MIB),
            _pro_blackwell(110, 2290),
            {
                "*": _RTX_PRO_5000,
                "l2_bytes": _CATALOGUES,
                "boost_clock_mhz": _CLOCK_OF_FP4,
                "peak_tflops": _PRO_6000_PEAKS,
            },
            driver_names=(driver_name,),
        )
        for name, memory_gib, driver_name in (
            ("RTX PRO 5000 Blackwell", 48, "RTX PRO 5000 Blackwell"),
            ("RTX PRO 5000 Blackwell 72GB", 72, "RTX PRO 5000 72GB Blackwell"),
        )
    ),
    Device(
        *("RTX PRO 4500 Blackwell", "sm_120", 82, 2617, 32 * _GIB, 896, 64 * _MIB),
        _pro_blackwell(82, 2617),
        {
            "*": _RTX_PRO_4500,
            "l2_bytes": _CATALOGUES,
            "boost_clock_mhz": _CATALOGUES,
            "peak_tflops": _PRO_6000_PEAKS,
        },
        driver_names=("RTX PRO 4500 Blackwell",),
    ),
    Device(
        *("RTX 5090", "sm_120", 170, 2407, 32 * _GIB, 1792, 96 * _MIB),
        _matrix(209.5, fp8_e4m3=419.0, mxfp4=1676.0, nvfp4=1676.0, int8=838.0, tf32=104.8, fp32=104.8),
        {"*": _RTX_BLACKWELL},
        driver_names=("GeForce RTX 5090",),
    ),
    Device(
        *("RTX 5080", "sm_120", 84, 2617, 16 * _GIB, 960, 64 * _MIB),
        _matrix(112.6, fp8_e4m3=225.1, mxfp4=900.4, nvfp4=900.4, int8=450.2, tf32=56.3, fp32=56.3),
        {"*": _RTX_BLACKWELL_80},
        driver_names=("GeForce RTX 5080",),
    ),
    Device(
        *("RTX 5070 Ti", "sm_120", 70, 2452, 16 * _GIB, 896, 48 * _MIB),
        _matrix(87.9, fp8_e4m3=175.8, mxfp4=703.0, nvfp4=703.0, int8=351.5, tf32=43.9, fp32=43.9),
        {"*": _RTX_BLACKWELL_80},
        driver_names=("GeForce RTX 5070 Ti",),
    ),
    Device(
        *("Jetson AGX Thor", "sm_110", 20, 1575, 128 * _GIB, 273, 32 * _MIB),
        _per_clock(20, 1575, 8192, fp8_e4m3=16384, mxfp4=32768, nvfp4=32768, tf32=4096, fp32=256),
        {
            "*": _THOR,
            "sm_count": _DEVICE_REPORTS,
            "l2_bytes": _DEVICE_REPORTS,
            "peak_tflops": f"{_THOR}, which is fp4 and fp8; others with operations per clock as on the B200",
        },
        driver_names=("Thor",),
    ),
    Device(
        *("GB10", "sm_121", 48, 2543, 128 * _GIB, 273, 24 * _MIB),
        _matrix(250.0, fp8_e4m3=250.0, mxfp4=500.0, nvfp4=500.0, int8=250.0, fp32=31.0),
        {
            "*": _SPARK,
            "sm_count": _DEVICE_REPORTS,
            "l2_bytes": _DEVICE_REPORTS,
            "boost_clock_mhz": _CLOCK_OF_FP4,
            "peak_tflops": _SPARK_PEAKS,
        },
        driver_names=("GB10",),
    ),
)

_AMD = (
    Device(
        *("MI300X", "gfx942", 304, 2100, 192 * _GIB, 5300, 32 * _MIB),
        _MI300X_PEAK,
        {"*": _CDNA3},
        driver_names=("AMD Instinct MI300X",),
    ),
    Device(
        *("MI325X", "gfx942", 304, 2100, 256 * _GIB, 6000, 32 * _MIB),
        _MI300X_PEAK,
        {"*": _MI325X, "l2_bytes": _CDNA3},
        driver_names=("AMD Instinct MI325X",),
    ),
    Device(
        *("MI355X", "gfx950", 256, 2400, 288 * _GIB, 8000, 32 * _MIB),
        _matrix(2516.6, fp8_e4m3=5033.2, mxfp4=10066.3, int8=5033.2, fp32=157.3),
        {"*": _CDNA4},
        driver_names=("AMD Instinct MI355X",),
    ),
    Device(
        *("MI350X", "gfx950", 256, 2200, 288 * _GIB, 8000, 32 * _MIB),
        _matrix(2306.9, fp8_e4m3=4613.7, mxfp4=9227.5, int8=4613.7, fp32=144.2),
        {"*": _MI350X},
        driver_names=("AMD Instinct MI350X",),
    ),
)

PRODUCTS = (*_AMPERE, *_ADA_LOVELACE, *_HOPPERS, *_BLACKWELLS, *_AMD)
"""The first of an arch stands for it where no device is named."""
