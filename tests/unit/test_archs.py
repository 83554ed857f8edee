"""Instruction sets: which of them a CPU runs, and how they are named."""

from __future__ import annotations

import platform
from dataclasses import replace

import pytest

from tilewright.codegen.hardware.archs import ARCHS, CPU_ARCHS, GPU_ARCHS, GpuArch, find_arch, native_arch, runs_on
from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.hardware.cpu_info import CpuInfo, read_cpu_info
from tilewright.errors import TilewrightError

AVX2, AVX512, NEON = ARCHS["x86_64_avx2"], ARCHS["x86_64_avx512"], ARCHS["aarch64_neon"]
AVX2_VNNI, AVX512_VNNI, NEON_DOT = (
    ARCHS[name] for name in ("x86_64_avx2_vnni", "x86_64_avx512_vnni", "aarch64_neon_dotprod")
)
ZEN = CpuInfo(
    name="a CPU",
    machine="x86_64",
    vendor="AuthenticAMD",
    model="23-1",
    features=frozenset({"sse2", "avx", "avx2", "fma"}),
    l1d_bytes=32 << 10,
    l2_bytes=512 << 10,
    l3_bytes=8 << 20,
    memory_bytes=16 << 30,
)
SKYLAKE = replace(ZEN, features=ZEN.features | {"avx512f", "avx512vl", "avx512dq", "avx512bw"})
ALDER_LAKE = replace(ZEN, features=ZEN.features | {"avx_vnni"})
SAPPHIRE_RAPIDS = replace(SKYLAKE, features=SKYLAKE.features | {"avx512_vnni", "avx_vnni"})
ARM = replace(ZEN, machine="aarch64", features=frozenset({"fp", "asimd"}))
GRAVITON2 = replace(ARM, features=ARM.features | {"asimddp"})


@pytest.mark.parametrize(
    ("cpu", "arch"),
    [
        (ZEN, AVX2),
        (ALDER_LAKE, AVX2_VNNI),
        (SKYLAKE, AVX512),
        (SAPPHIRE_RAPIDS, AVX512_VNNI),
        (ARM, NEON),
        (GRAVITON2, NEON_DOT),
    ],
)
def test_native_is_the_widest_that_runs_with_most_features(cpu: CpuInfo, arch) -> None:
    assert native_arch(cpu) is arch


@pytest.mark.parametrize("missing", ["avx2", "fma"])
def test_every_feature_is_needed(missing: str) -> None:
    assert not runs_on(AVX2, replace(ZEN, features=ZEN.features - {missing}))
    assert not runs_on(AVX512, replace(SKYLAKE, features=SKYLAKE.features - {missing}))
    assert not runs_on(NEON, ZEN)
    assert runs_on(AVX2, SKYLAKE)


@pytest.mark.parametrize("cpu", [replace(ZEN, features=frozenset({"sse2"})), replace(ZEN, machine="riscv64")])
def test_an_unsupported_cpu_is_told_what_is_needed(cpu: CpuInfo) -> None:
    with pytest.raises(TilewrightError, match=rf"a CPU, {cpu.machine}.* needs AVX2 with FMA, AVX-512, or NEON"):
        native_arch(cpu)


def test_names() -> None:
    assert find_arch("native") is native_arch()
    assert {name: find_arch(name) for name in ARCHS} == ARCHS
    assert find_arch(platform.machine()) is native_arch()
    (other,) = {"x86_64", "aarch64"} - {platform.machine()}
    assert find_arch(other).machine == other


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(TilewrightError, match=r"unknown arch 'sm_1'; known archs: native, x86_64_avx2"):
        find_arch("sm_1")


@pytest.mark.parametrize("arch", CPU_ARCHS.values(), ids=lambda arch: arch.name)
def test_cpu_archs_are_consistent(arch) -> None:
    assert ARCHS[arch.name] is arch
    assert arch.name.startswith(arch.machine)
    assert arch.lanes(4) * 4 == arch.vector_bytes
    assert arch.lanes(2) == 2 * arch.lanes(4)


@pytest.mark.parametrize("arch", GPU_ARCHS.values(), ids=lambda arch: arch.name)
def test_gpu_archs_are_consistent(arch: GpuArch) -> None:
    assert ARCHS[arch.name] is arch
    assert arch.triton_target[0] == arch.family
    assert arch.binary_target.startswith(arch.name)
    assert arch.smem_bytes_per_block + arch.smem_reserved_bytes <= arch.smem_bytes_per_sm
    assert arch.threads_per_block <= arch.threads_per_sm
    assert arch.threads_per_sm % arch.warp_size == 0
    assert arch.registers_per_sm % arch.register_unit == 0
    assert set(arch.mma) >= {"fp16", "bf16"}
    assert ("fp8_e4m3" in arch.mma) == ("fp8_mma" in arch.capabilities)
    assert ("tcgen05" in arch.capabilities) == (arch.tensor_memory_columns > 0)
    assert not runs_on(arch, ZEN)


def test_a_device_key_tells_cpu_models_and_caches_apart() -> None:
    assert ZEN.key == "x86_64/AuthenticAMD-23-1/32k-512k-8192k"
    others = [replace(ZEN, model="23-2"), replace(ZEN, l3_bytes=16 << 20), ARM]
    assert len({cpu.key for cpu in [ZEN, *others]}) == 4
    assert replace(ZEN, memory_bytes=1 << 30, name="other").key == ZEN.key


def test_this_machine_is_read() -> None:
    cpu = read_cpu_info()
    assert cpu.machine == platform.machine()
    assert cpu.features
    assert cpu.memory_bytes > 1 << 28
    assert usable_cores() >= 1


def test_a_virtual_machine_does_not_own_the_cache_of_its_host() -> None:
    guest = replace(ZEN, l3_bytes=504 << 20, cores=2)
    assert guest.own_cache_bytes == 128 << 20
    assert replace(guest, cores=128).own_cache_bytes == guest.l3_bytes
    assert replace(ZEN, cores=4).own_cache_bytes == ZEN.l3_bytes
    assert replace(ZEN, l3_bytes=0).own_cache_bytes == ZEN.l2_bytes
    assert replace(ZEN, l3_bytes=0, l2_bytes=0).own_cache_bytes > 0
