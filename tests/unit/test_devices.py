"""GPU products: complete, consistent with their archs, with a source for every figure, and found by name."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tilewright.codegen.hardware.archs import GPU_ARCHS, GpuArch
from tilewright.codegen.hardware.devices import DEVICES, Device, default_device, find_device
from tilewright.errors import TilewrightError

FIGURES = {"sm_count", "boost_clock_mhz", "memory_bytes", "bandwidth_gbps", "l2_bytes", "peak_tflops"}

each_device = pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.key)


def refuse(message: str) -> None:
    raise AssertionError(message)


@each_device
def test_every_figure_has_a_source(device: Device) -> None:
    named = {field.name for field in fields(Device)}
    assert named >= FIGURES
    assert set(device.sources) - {"*"} <= FIGURES
    assert all(len(device.source(field)) > 10 for field in FIGURES)


@each_device
def test_peaks_are_for_what_the_arch_multiplies(device: Device) -> None:
    assert set(device.arch.mma) <= set(device.peak_tflops) | {"tf32"}
    peak = device.peak_tflops
    assert peak["fp16"] == peak["bf16"]
    if "fp8_e4m3" in peak:
        assert peak["fp8_e4m3"] == pytest.approx(2 * peak["bf16"], rel=0.02)


@each_device
def test_clock_and_peak_agree(device: Device) -> None:
    """Operations per clock of one multiprocessor are a power of two: a typo in any of the three figures shows."""
    per_clock = device.peak_tflops["bf16"] * 1e6 / device.sm_count / device.boost_clock_mhz
    assert min(abs(per_clock / 2**power - 1) for power in range(8, 15)) < 0.025, per_clock


@pytest.mark.parametrize("arch", GPU_ARCHS.values(), ids=lambda arch: arch.name)
def test_every_arch_has_a_default_device(arch: GpuArch) -> None:
    device = default_device(arch)
    assert device.arch is arch
    assert find_device(None, arch, refuse) is device


@pytest.mark.parametrize("name", ["rtx-5090", "RTX 5090", "NVIDIA RTX 5090", "rtx5090"])
def test_a_device_is_found_by_any_spelling_of_its_name(name: str) -> None:
    assert find_device(name, GPU_ARCHS["sm_120"], refuse) is DEVICES["rtx-5090"]


def test_an_unknown_device_is_taken_for_the_default_with_a_warning() -> None:
    warnings: list[str] = []
    device = find_device("H800 turbo", GPU_ARCHS["sm_90"], warnings.append)
    assert device is default_device(GPU_ARCHS["sm_90"])
    assert warnings == [
        "device 'H800 turbo' is not known, so H100 SXM stands for sm_90; known of that arch: h100-sxm, h100-pcie, h200"
    ]


def test_a_device_of_another_arch_is_refused() -> None:
    with pytest.raises(TilewrightError, match=r"device H200 is sm_90, not sm_100; use --arch sm_90"):
        find_device("h200", GPU_ARCHS["sm_100"], refuse)
