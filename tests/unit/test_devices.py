"""GPU products: complete, consistent with their archs, with a source for every figure; found by name or by driver."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest

from tilewright.codegen.hardware.archs import GPU_ARCHS, GpuArch
from tilewright.codegen.hardware.devices import (
    DEVICES,
    Device,
    DriverFacts,
    default_device,
    describe_device,
    device_key,
    find_device,
    match_device,
)
from tilewright.codegen.hardware.products import PRODUCTS
from tilewright.errors import TilewrightError

FIGURES = {"sm_count", "boost_clock_mhz", "memory_bytes", "bandwidth_gbps", "l2_bytes", "peak_tflops"}
SAME_RATE_FOR_FP8 = {"gb10"}
"""Devices whose fp8 is no faster than bf16: their sources say how that is known."""
GIB, MIB = 1 << 30, 1 << 20

each_device = pytest.mark.parametrize("device", PRODUCTS, ids=lambda device: device.key)


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
        faster = 1 if device.key in SAME_RATE_FOR_FP8 else 2
        assert peak["fp8_e4m3"] == pytest.approx(faster * peak["bf16"], rel=0.02)


@each_device
def test_clock_and_peak_agree(device: Device) -> None:
    """Operations per clock of one multiprocessor are a power of two: a typo in any of the three figures shows."""
    per_clock = device.peak_tflops["bf16"] * 1e6 / device.sm_count / device.boost_clock_mhz
    assert min(abs(per_clock / 2**power - 1) for power in range(8, 15)) < 0.025, per_clock


def test_no_two_products_share_a_key_or_what_a_driver_calls_them() -> None:
    assert len(DEVICES) == len(PRODUCTS)
    names = [name.lower() for device in PRODUCTS for name in device.driver_names]
    assert len(set(names)) == len(names) >= len(PRODUCTS)


@pytest.mark.parametrize("arch", GPU_ARCHS.values(), ids=lambda arch: arch.name)
def test_every_arch_has_a_default_device(arch: GpuArch) -> None:
    device = default_device(arch)
    assert device.arch is arch
    assert find_device(None, arch) is device


@pytest.mark.parametrize(
    ("name", "arch", "key"),
    [
        *((name, "sm_120", "rtx-5090") for name in ("rtx-5090", "RTX 5090", "NVIDIA RTX 5090", "rtx5090")),
        ("NVIDIA GeForce RTX 5090", "sm_120", "rtx-5090"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "h100-sxm"),
        ("H20-3e", "sm_90", "h20-141gb"),
        ("h20", "sm_90", "h20"),
        ("h200", "sm_90", "h200"),
        ("gb10", "sm_121", "gb10"),
        ("AMD Instinct MI350X", "gfx950", "mi350x"),
    ],
)
def test_a_device_is_found_by_any_spelling_of_its_names(name: str, arch: str, key: str) -> None:
    assert find_device(name, GPU_ARCHS[arch]) is DEVICES[key]


@pytest.mark.parametrize(
    ("name", "arch", "nearest"),
    [
        ("H800 turbo", "sm_90", "h800-sxm (sm_90)"),
        ("RTX 5080 Ti", "sm_89", "rtx-5070-ti (sm_120)"),
        ("MI350", "gfx950", "mi350x (gfx950)"),
        ("B100", "sm_100", "b200 (sm_100)"),
        ("", "sm_121", "gb10 (sm_121)"),
    ],
)
def test_an_unknown_device_is_refused_with_the_nearest_named(name: str, arch: str, nearest: str) -> None:
    of_arch = ", ".join(device.key for device in PRODUCTS if device.arch_name == arch)
    with pytest.raises(TilewrightError) as refusal:
        find_device(name, GPU_ARCHS[arch])
    told = str(refusal.value)
    assert told.startswith(f"device {name!r} is not known; the nearest name is {nearest}")
    assert told.endswith(f"those of {arch} are {of_arch}")
    assert "\n" not in told


def test_a_device_of_another_arch_is_refused() -> None:
    with pytest.raises(TilewrightError, match=r"device H200 is sm_90, not sm_100; use --arch sm_90"):
        find_device("h200", GPU_ARCHS["sm_100"])


def capability(arch_name: str) -> tuple[int, int]:
    return divmod(int(arch_name.removeprefix("sm_")), 10)


REPORTED = [
    ("NVIDIA A100-SXM4-80GB", "sm_80", 108, 81251 * MIB, "a100-sxm-80gb"),
    ("A100-SXM4-40GB", "sm_80", 108, 40339 * MIB, "a100-sxm-40gb"),
    ("NVIDIA A100 80GB PCIe", "sm_80", 108, 81051 * MIB, "a100-pcie-80gb"),
    ("NVIDIA A10", "sm_86", 72, 22503 * MIB, "a10"),
    ("NVIDIA L4", "sm_89", 58, 22563 * MIB, "l4"),
    ("NVIDIA L40S", "sm_89", 142, 45589 * MIB, "l40s"),
    ("NVIDIA GeForce RTX 4090", "sm_89", 128, 24217 * MIB, "rtx-4090"),
    ("NVIDIA GeForce RTX 4090 D", "sm_89", 114, 24210 * MIB, "rtx-4090-d"),
    ("NVIDIA H100 80GB HBM3", "sm_90", 132, 85520809984, "h100-sxm"),
    ("NVIDIA H100 NVL", "sm_90", 132, 95830 * MIB, "h100-nvl"),
    ("NVIDIA H200", "sm_90", 132, 143156 * MIB, "h200"),
    ("NVIDIA H20", "sm_90", 78, 97871 * MIB, "h20"),
    ("NVIDIA GH200 480GB", "sm_90", 132, 96768 * MIB, "gh200-96gb"),
    ("NVIDIA B200", "sm_100", 148, 183359 * MIB, "b200"),
    ("NVIDIA B300 SXM6 AC", "sm_103", 148, 275040 * MIB, "b300"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "sm_120", 188, 97887 * MIB, "rtx-pro-6000-blackwell"),
    ("NVIDIA RTX PRO 5000 Blackwell", "sm_120", 110, 48935 * MIB, "rtx-pro-5000-blackwell"),
    ("NVIDIA GB10", "sm_121", 48, 130602405888, "gb10"),
]
"""What drivers say, as their users published it: name, arch, multiprocessors, bytes of memory."""


@pytest.mark.parametrize(("name", "arch", "sm_count", "memory_bytes", "key"), REPORTED, ids=str)
def test_a_product_is_known_by_what_its_driver_says(
    name: str, arch: str, sm_count: int, memory_bytes: int, key: str
) -> None:
    said = (name, capability(arch), sm_count, memory_bytes)
    assert match_device(*said) is DEVICES[key]
    assert device_key(*said) == key
    assert describe_device(DriverFacts(*said)) is DEVICES[key]


@pytest.mark.parametrize(
    "device", [device for device in PRODUCTS if device.arch.family == "cuda"], ids=lambda device: device.key
)
def test_no_part_of_a_product_is_taken_for_it(device: Device) -> None:
    cc, sms, memory = capability(device.arch_name), device.sm_count, device.memory_bytes
    others = set()
    for name in device.driver_names:
        full = f"NVIDIA {name}"
        assert match_device(full, cc, sms, memory) is device
        strangers = [
            (f"{full} MIG 7g.80gb", sms, memory),
            (f"{full} MIG 3g.40gb", sms // 2, memory // 2),
            (f"{full}-24Q", sms, memory),
            (f"{full} Laptop GPU", sms, memory),
            (full, sms - 2, memory),
            (full, sms, memory // 2),
            (full, sms, 2 * memory),
        ]
        for each, sm_count, memory_bytes in strangers:
            assert match_device(each, cc, sm_count, memory_bytes) is None
            others.add(device_key(each, cc, sm_count, memory_bytes))
        assert match_device(full, (cc[0], cc[1] + 5), sms, memory) is None
    assert not others & DEVICES.keys()
    assert len(others) == len(strangers) * len(device.driver_names)


SLICE = DriverFacts("NVIDIA H100 80GB HBM3 MIG 3g.40gb", (9, 0), 60, 40320 * MIB, 1_980_000, 2_619_000, 2560, 30 * MIB)
"""What a driver may say of a slice; nobody here has seen one."""


def test_a_device_without_an_entry_is_described_from_its_drivers_attributes() -> None:
    found = describe_device(SLICE)
    assert found.key == "h100-80gb-hbm3-mig-3g-40gb-60-sms-40-gib"
    assert found.key == device_key(SLICE.name, SLICE.capability, SLICE.sm_count, SLICE.memory_bytes)
    assert found.arch is GPU_ARCHS["sm_90"]
    assert (found.sm_count, found.boost_clock_mhz, found.memory_bytes) == (60, 1980, SLICE.memory_bytes)
    assert (found.l2_bytes, found.bandwidth_gbps) == (30 * MIB, pytest.approx(1676.16))
    whole = DEVICES["h100-sxm"]
    share = 60 * 1980 / (132 * 1830)
    assert found.peak_tflops == pytest.approx({dtype: share * peak for dtype, peak in whole.peak_tflops.items()})
    assert found.source("peak_tflops").startswith("derived: ")
    assert found.source("bandwidth_gbps") == "its driver's attributes"


def test_what_a_driver_does_not_say_is_assumed_and_called_so() -> None:
    found = describe_device(DriverFacts("NVIDIA GeForce RTX 3060", (8, 6), 28, 12020 * MIB))
    like = DEVICES["rtx-3090"]
    assert found.key == "geforce-rtx-3060-28-sms-12-gib"
    assert found.boost_clock_mhz == like.boost_clock_mhz
    for field in ("boost_clock_mhz", "l2_bytes", "bandwidth_gbps"):
        assert re.match(r"assumed: .*RTX 3090", found.source(field))
    assert found.bandwidth_gbps == pytest.approx(like.bandwidth_gbps * 28 / 82)


def test_multiprocessors_of_a_card_are_taken_for_those_of_its_own_kind() -> None:
    card = DriverFacts("NVIDIA GeForce RTX 4070", (8, 9), 46, 12 * GIB, 2_475_000)
    board = replace(card, name="NVIDIA RTX 4000 Ada Generation")
    assert describe_device(board).peak_tflops["bf16"] == pytest.approx(
        2 * describe_device(card).peak_tflops["bf16"], rel=0.02
    )


@pytest.mark.parametrize(
    ("reported_mib", "sold_gib"), [(22515, 24), (24217, 24), (9995, 10), (45589, 48), (121, 0.125)]
)
def test_a_key_does_not_change_with_what_ecc_and_the_driver_keep(reported_mib: int, sold_gib: float) -> None:
    key = device_key("NVIDIA Unheard", (8, 9), 10, reported_mib * MIB)
    assert key == f"unheard-10-sms-{sold_gib:g}-gib".replace(".", "-")


def test_a_device_that_nothing_is_generated_for_is_refused() -> None:
    with pytest.raises(TilewrightError, match=r"Tesla T4 is sm_75, for which nothing is generated; supported"):
        describe_device(DriverFacts("Tesla T4", (7, 5), 40, 15 * GIB))
