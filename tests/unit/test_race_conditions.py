"""What is known of a device while it races, told by a stand-in of NVIDIA's management library."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tilewright.tuner.evaluation.device import conditions
from tilewright.tuner.evaluation.device.conditions import Monitor
from tilewright.tuner.evaluation.device.nvml import LIBRARY_VARIABLE, Nvml, Reading

UUID = "11111111-2222-3333-4444-555555555555"
CALM, CAPPED, HOT = "1980 2619 412000 58 0", "1755 2619 700000 66 4", "1200 2619 650000 88 64"
Device = Callable[..., Nvml]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler to build the stand-in of NVML with")
    path = tmp_path_factory.mktemp("nvml") / "nvml.so"
    source = Path(__file__).parents[1] / "standin/nvml.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


@pytest.fixture
def device(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device that will be as the lines say, one look after the other."""

    def made(*lines: str, prefix: str = "GPU-") -> Nvml:
        copy = shutil.copyfile(library, tmp_path / f"{len(list(tmp_path.iterdir()))}.so")  # with a state of its own
        (tmp_path / "looks").write_text("\n".join(lines))
        monkeypatch.setenv("TILEWRIGHT_STANDIN_NVML", str(tmp_path / "looks"))
        monkeypatch.setenv("TILEWRIGHT_STANDIN_UUID", prefix + UUID)
        monkeypatch.setenv(LIBRARY_VARIABLE, str(copy))
        found = Nvml.find(UUID)
        assert found is not None
        return found

    return made


@pytest.fixture(autouse=True)
def _look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_BETWEEN_READINGS_S", 0.0)
    monkeypatch.setattr(conditions, "_POLL_S", 0.0)


def test_a_look_tells_clocks_power_temperature_and_why_clocks_are_held_down(device: Device) -> None:
    nvml = device(CALM, CAPPED)
    assert nvml.read() == Reading(1980, 2619, 412.0, 58, ())
    assert nvml.read() == Reading(1755, 2619, 700.0, 66, ("power cap",))


def test_what_a_device_does_not_tell_is_not_made_up(device: Device) -> None:
    assert device("-1 2619 -1 -1 0", prefix="MIG-").read() == Reading(None, 2619, None, None, ())


@pytest.mark.parametrize("library_name", ["/nowhere.so", None])
def test_without_the_library_or_the_device_nothing_is_known(
    device: Device, monkeypatch: pytest.MonkeyPatch, library_name: str | None
) -> None:
    device(CALM)
    if library_name is None:
        assert Nvml.find("another") is None
    else:
        monkeypatch.setenv(LIBRARY_VARIABLE, library_name)
        assert Nvml.find(UUID) is None


def test_a_race_is_described_by_the_ranges_of_what_was_seen(device: Device) -> None:
    monitor = Monitor(device(CALM, CAPPED, CALM))
    monitor.begin()
    monitor.look()
    assert not monitor.slowed_down, "kernels meet a cap of the power where they are served, too"
    assert monitor.conditions("graph replay", "13.0", 1).to_dict() == {
        "method": "graph replay",
        "driver": "13.0",
        "sm_clock_mhz": [1755, 1980],
        "memory_clock_mhz": [2619, 2619],
        "power_w": [412.0, 700.0],
        "temperature_c": [58, 66],
        "throttled": ["power cap"],
        "repeats": 1,
    }


def test_heat_slows_a_race_down_until_the_device_has_cooled(device: Device) -> None:
    monitor = Monitor(device(HOT, HOT, CALM, CALM))
    monitor.begin()
    assert monitor.slowed_down
    monitor.cool_down()
    monitor.begin()
    assert not monitor.slowed_down
    assert monitor.conditions("events", "13.0", 1).throttled == ()


def test_without_the_library_a_race_says_how_it_was_timed() -> None:
    monitor = Monitor(None)
    monitor.begin()
    monitor.cool_down()
    told = monitor.conditions("events", "12.8", 0).to_dict()
    assert told == {"method": "events", "driver": "12.8", "throttled": [], "repeats": 0}
