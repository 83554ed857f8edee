"""Instruction sets that tilewright compiles for, as data; a new one is one entry in ``ARCHS``.

Limits of NVIDIA archs are those of the CUDA C++ Programming Guide 13.0, section "Compute Capabilities", table
"Technical Specifications per Compute Capability"; tensor memory is from the PTX ISA 9.0, section "Tensor Memory".
Those of AMD archs are from the CDNA 3 and CDNA 4 instruction set guides, section "Wavefronts and LDS", and from what
LLVM's AMDGPU back end allocates by (``AMDGPUBaseInfo.cpp``).
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tilewright.codegen.hardware.cpu_info import CpuInfo, read_cpu_info
from tilewright.errors import TilewrightError


@dataclass(frozen=True)
class Arch:
    """An instruction set: what a kernel for it may use."""

    name: str
    family: Literal["cpu", "cuda", "hip"]

    def among(self, families: Collection[str]) -> bool:
        """Whether it is of one of ``families``, those of a template for example."""
        return self.family in families


@dataclass(frozen=True)
class CpuArch(Arch):
    """An instruction set of a CPU, at one level of its features."""

    machine: str
    """``platform.machine()`` of a host that runs it."""
    features: tuple[str, ...]
    """CPU flags that must be present, in the operating system's spelling."""
    compile_flags: tuple[str, ...]
    vector_bytes: int
    vector_registers: int
    dot: Literal["vpmaddwd", "vpdpbusd", "sdot", ""] = ""
    """Instruction that adds up products of neighbouring integers in 32 bits: of two words of 16 bits, of four bytes
    without a sign and four with, of four with each; empty: none."""

    def lanes(self, itemsize: int) -> int:
        """Elements of ``itemsize`` bytes in one vector register."""
        return self.vector_bytes // itemsize


@dataclass(frozen=True)
class GpuArch(Arch):
    """An instruction set of GPUs, with what one multiprocessor (SM, or CU) of any device of it has."""

    triton_target: tuple[str, int | str, int]
    """Backend, architecture and warp size: the arguments of Triton's ``GPUTarget``."""
    binary_target: str
    """What binaries are compiled for; with arch-specific instructions a name of its own (``sm_90a``)."""
    capabilities: frozenset[str]
    """What templates ask for: ``tma``, ``tma_gather``, ``warp_specialize``, ``wgmma``, ``tcgen05``, ``fp8_mma``
    (products of fp8), ``fp8_fnuz`` (its e4m3 is AMD's own), ``dot_scaled`` (block scales in the matrix unit),
    ``async_copy``."""
    mma: Mapping[str, str] = field(hash=False)
    """What the name of the matrix instruction begins with in the disassembly, by type of the operands."""
    smem_bytes_per_block: int
    """Most shared memory of one block, opted in to where that is needed."""
    smem_bytes_per_sm: int
    smem_reserved_bytes: int
    """Of every block, taken by the system."""
    registers_per_sm: int
    """Of 32 bits."""
    registers_per_thread: int
    register_unit: int
    """Registers of a warp are allocated in multiples of so many."""
    threads_per_block: int
    threads_per_sm: int
    blocks_per_sm: int
    blocks_per_cluster: int
    """Most that can be asked for without opting in; 1: no clusters."""
    tensor_memory_columns: int = 0
    """Of 128 lanes of 32 bits; 0: no tensor memory."""

    @property
    def warp_size(self) -> int:
        """Threads of a warp (a wavefront)."""
        return self.triton_target[2]


def _cuda(
    capability: int,
    *,
    capabilities: str,
    mma: Mapping[str, str],
    smem_kib: int,
    threads: int,
    blocks: int,
    suffix: str = "",
    clusters: bool = False,
    tensor_memory_columns: int = 0,
) -> GpuArch:
    """An NVIDIA arch: registers, block size and what the system reserves are the same from 8.0 to 12.1."""
    return GpuArch(
        f"sm_{capability}",
        "cuda",
        triton_target=("cuda", capability, 32),
        binary_target=f"sm_{capability}{suffix}",
        capabilities=frozenset(capabilities.split()),
        mma=mma,
        smem_bytes_per_block=(smem_kib - 1) << 10,
        smem_bytes_per_sm=smem_kib << 10,
        smem_reserved_bytes=1 << 10,
        registers_per_sm=64 << 10,
        registers_per_thread=255,
        register_unit=256,
        threads_per_block=1024,
        threads_per_sm=threads,
        blocks_per_sm=blocks,
        blocks_per_cluster=8 if clusters else 1,
        tensor_memory_columns=tensor_memory_columns,
    )


def _cdna(name: str, *, capabilities: str, mma: Mapping[str, str], lds_kib: int) -> GpuArch:
    """An AMD arch with 4 SIMDs of 8 waves to a CU, 512 vector registers (with accumulators) to a lane."""
    return GpuArch(
        name,
        "hip",
        triton_target=("hip", name, 64),
        binary_target=name,
        capabilities=frozenset(capabilities.split()),
        mma=mma,
        smem_bytes_per_block=lds_kib << 10,
        smem_bytes_per_sm=lds_kib << 10,
        smem_reserved_bytes=0,
        registers_per_sm=4 * 512 * 64,
        registers_per_thread=512,
        register_unit=8 * 64,
        threads_per_block=1024,
        threads_per_sm=4 * 8 * 64,
        blocks_per_sm=16,
        blocks_per_cluster=1,
    )


_HMMA = {"fp16": "HMMA", "bf16": "HMMA", "tf32": "HMMA", "int8": "IMMA"}
_HOPPER = {"fp16": "HGMMA", "bf16": "HGMMA", "tf32": "HGMMA", "int8": "IGMMA", "fp8_e4m3": "QGMMA"}
_TCGEN05 = {
    **dict.fromkeys(("fp16", "bf16", "tf32"), "UTCHMMA"),
    **dict.fromkeys(("fp8_e4m3", "mxfp4"), "UTCQMMA"),
    "nvfp4": "UTCOMMA",
}
_MFMA = {"fp16": "v_mfma", "bf16": "v_mfma", "tf32": "v_mfma", "int8": "v_mfma", "fp8_e4m3": "v_mfma"}
_DATACENTER_BLACKWELL = "async_copy fp8_mma tma tma_gather warp_specialize tcgen05 dot_scaled"

_AVX2, _AVX2_FLAGS = ("avx2", "fma"), ("-mavx2", "-mfma")
_AVX512 = ("avx512f", "avx512vl", "avx512dq", "avx512bw", "avx2", "fma")
_AVX512_FLAGS = ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512")

CPU_ARCHS: dict[str, CpuArch] = {
    arch.name: arch
    for arch in (
        CpuArch("x86_64_avx2", "cpu", "x86_64", _AVX2, _AVX2_FLAGS, 32, 16, "vpmaddwd"),
        CpuArch(
            "x86_64_avx2_vnni", "cpu", "x86_64", (*_AVX2, "avx_vnni"), (*_AVX2_FLAGS, "-mavxvnni"), 32, 16, "vpdpbusd"
        ),
        CpuArch("x86_64_avx512", "cpu", "x86_64", _AVX512, _AVX512_FLAGS, 64, 32, "vpmaddwd"),
        CpuArch(
            "x86_64_avx512_vnni",
            "cpu",
            "x86_64",
            (*_AVX512, "avx512_vnni"),
            (*_AVX512_FLAGS, "-mavx512vnni"),
            64,
            32,
            "vpdpbusd",
        ),
        CpuArch("aarch64_neon", "cpu", "aarch64", ("asimd",), ("-march=armv8-a",), 16, 32),
        CpuArch(
            "aarch64_neon_dotprod",
            "cpu",
            "aarch64",
            ("asimd", "asimddp"),
            ("-march=armv8.2-a+dotprod",),
            16,
            32,
            "sdot",
        ),
    )
}

GPU_ARCHS: dict[str, GpuArch] = {
    arch.name: arch
    for arch in (
        _cuda(80, capabilities="async_copy", mma=_HMMA, smem_kib=164, threads=2048, blocks=32),
        _cuda(86, capabilities="async_copy", mma=_HMMA, smem_kib=100, threads=1536, blocks=16),
        _cuda(
            89,
            capabilities="async_copy fp8_mma",
            mma={**_HMMA, "fp8_e4m3": "QMMA"},
            smem_kib=100,
            threads=1536,
            blocks=24,
        ),
        _cuda(
            90,
            capabilities="async_copy fp8_mma tma warp_specialize wgmma",
            mma=_HOPPER,
            smem_kib=228,
            threads=2048,
            blocks=32,
            suffix="a",
            clusters=True,
        ),
        *(
            _cuda(
                capability,
                capabilities=_DATACENTER_BLACKWELL,
                mma=_TCGEN05,
                smem_kib=228,
                threads=2048,
                blocks=32,
                suffix="a",
                clusters=True,
                tensor_memory_columns=512,
            )
            for capability in (100, 103)
        ),
        _cuda(
            110,
            capabilities=_DATACENTER_BLACKWELL,
            mma=_TCGEN05,
            smem_kib=228,
            threads=1536,
            blocks=24,
            suffix="a",
            clusters=True,
            tensor_memory_columns=512,
        ),
        _cuda(
            120,
            capabilities="async_copy fp8_mma tma tma_gather warp_specialize dot_scaled",
            mma={**_HMMA, "fp8_e4m3": "QMMA", "mxfp4": "QMMA", "nvfp4": "OMMA"},
            smem_kib=100,
            threads=1536,
            blocks=24,
            suffix="a",
            clusters=True,
        ),
        # It has the instructions of 12.0, of which Triton 3.7 uses none for fp8 (a product of fp16) and block scales.
        _cuda(
            121,
            capabilities="async_copy fp8_mma tma tma_gather warp_specialize",
            mma={**_HMMA, "fp8_e4m3": "HMMA"},
            smem_kib=100,
            threads=1536,
            blocks=24,
            suffix="a",
            clusters=True,
        ),
        _cdna("gfx942", capabilities="fp8_mma fp8_fnuz", mma=_MFMA, lds_kib=64),
        _cdna("gfx950", capabilities="async_copy fp8_mma dot_scaled", mma={**_MFMA, "mxfp4": "v_mfma"}, lds_kib=160),
    )
}

ARCHS: dict[str, Arch] = {**CPU_ARCHS, **GPU_ARCHS}


def native_arch(cpu: CpuInfo | None = None) -> CpuArch:
    """The CPU arch with the widest vectors, and of those with the most features, that this machine runs.

    Raises:
        TilewrightError: when this CPU is none that tilewright generates for.

    """
    cpu = cpu or read_cpu_info()
    runnable = [arch for arch in CPU_ARCHS.values() if runs_on(arch, cpu)]
    if not runnable:
        raise TilewrightError(
            f"this CPU ({cpu.name}, {cpu.machine}) is not supported: tilewright needs AVX2 with FMA, AVX-512, or NEON"
        )
    return max(runnable, key=lambda arch: (arch.vector_bytes, len(arch.features)))


def runs_on(arch: Arch, cpu: CpuInfo) -> bool:
    """Whether ``cpu`` executes code compiled for ``arch``."""
    return isinstance(arch, CpuArch) and arch.machine == cpu.machine and set(arch.features) <= cpu.features


def find_arch(name: str) -> Arch:
    """Arch by name; ``native`` is this machine's, ``x86_64`` and ``aarch64`` the best level of theirs it runs.

    Raises:
        TilewrightError: for an unknown name, or ``native`` on an unsupported CPU.

    """
    if name == "native":
        return native_arch()
    if name in ARCHS:
        return ARCHS[name]
    levels = [arch for arch in CPU_ARCHS.values() if arch.machine == name]
    if not levels:
        known = ", ".join(["native", *ARCHS])
        raise TilewrightError(f"unknown arch {name!r}; known archs: {known}")
    return native_arch() if platform.machine() == name else levels[0]
