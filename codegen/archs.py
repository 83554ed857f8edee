"""Instruction sets that tilewright compiles for. CPU archs here; a new one is one entry in ``ARCHS``."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

from tilewright.codegen.cpu_info import CpuInfo, read_cpu_info
from tilewright.errors import TilewrightError


@dataclass(frozen=True)
class Arch:
    """An instruction set: what a kernel for it may use."""

    name: str
    family: Literal["cpu", "cuda", "hip"]
    machine: str
    """``platform.machine()`` of a host that runs it."""
    features: tuple[str, ...]
    """CPU flags that must be present, in the operating system's spelling."""
    compile_flags: tuple[str, ...]
    vector_bytes: int
    vector_registers: int

    def lanes(self, itemsize: int) -> int:
        """Elements of ``itemsize`` bytes in one vector register."""
        return self.vector_bytes // itemsize


ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("x86_64_avx2", "cpu", "x86_64", ("avx2", "fma"), ("-mavx2", "-mfma"), 32, 16),
        Arch(
            "x86_64_avx512",
            "cpu",
            "x86_64",
            ("avx512f", "avx512vl", "avx512dq", "avx512bw", "avx2", "fma"),
            ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
            64,
            32,
        ),
        Arch("aarch64_neon", "cpu", "aarch64", ("asimd",), ("-march=armv8-a",), 16, 32),
    )
}


def native_arch(cpu: CpuInfo | None = None) -> Arch:
    """The widest arch that this machine runs.

    Raises:
        TilewrightError: when this CPU is none that tilewright generates for.

    """
    cpu = cpu or read_cpu_info()
    runnable = [arch for arch in ARCHS.values() if runs_on(arch, cpu)]
    if not runnable:
        raise TilewrightError(
            f"this CPU ({cpu.name}, {cpu.machine}) is not supported: tilewright needs AVX2 with FMA, AVX-512, or NEON"
        )
    return max(runnable, key=lambda arch: arch.vector_bytes)


def runs_on(arch: Arch, cpu: CpuInfo) -> bool:
    """Whether ``cpu`` executes code compiled for ``arch``."""
    return arch.machine == cpu.machine and set(arch.features) <= cpu.features


def find_arch(name: str) -> Arch:
    """Arch by name; ``native`` is this machine's, ``x86_64`` and ``aarch64`` the best level of theirs it runs.

    Raises:
        TilewrightError: for an unknown name, or ``native`` on an unsupported CPU.

    """
    if name == "native":
        return native_arch()
    if name in ARCHS:
        return ARCHS[name]
    levels = [arch for arch in ARCHS.values() if arch.machine == name]
    if not levels:
        known = ", ".join(["native", *ARCHS])
        raise TilewrightError(f"unknown arch {name!r}; known archs: {known}")
    return native_arch() if platform.machine() == name else levels[0]
