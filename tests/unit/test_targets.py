"""Which target an arch and the user's wishes lead to, and that another one is a registration."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from executing import executing

from tilewright.codegen.hardware.archs import ARCHS, CPU_ARCHS, GPU_ARCHS, Arch, native_arch
from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.hardware.devices import DEVICES
from tilewright.errors import TilewrightError
from tilewright.tuner.targets import registry
from tilewright.tuner.targets.base import Target, Wishes
from tilewright.tuner.targets.device import DeviceTarget
from tilewright.tuner.targets.location import Location
from tilewright.tuner.targets.predicted import PredictedTarget
from tilewright.tuner.targets.registry import find_target


def refuse(text: str) -> None:
    raise AssertionError(text)


class HereAlone(PredictedTarget):
    """A target whose device is there if it is an H200."""

    @classmethod
    def find(cls, arch: Arch, wishes: Wishes, warn: Callable[[str], None]) -> "HereAlone | None":
        del arch, warn
        return cls(DEVICES["h200"]) if wishes.device == "h200" else None


@pytest.mark.parametrize("arch", [*GPU_ARCHS.values(), native_arch()], ids=lambda arch: arch.name)
def test_every_gpu_and_this_cpu_have_a_target(arch: Arch) -> None:
    with find_target(arch, Wishes(), refuse) as target:
        assert target.arch is arch
        assert target.device.arch == arch.name
        assert target.location.device_key == target.device.key


def test_this_machines_cpu_takes_as_many_threads_as_are_wished() -> None:
    assert find_target(native_arch(), Wishes(), refuse).location == Location(read_cpu_info().key, usable_cores())
    assert find_target(native_arch(), Wishes(threads=1), refuse).location.threads == 1


@pytest.mark.parametrize(
    ("arch", "wishes", "complaint"),
    [
        (native_arch().name, Wishes(device="h100-sxm"), "--device is of GPUs"),
        (native_arch().name, Wishes(threads=0), "--threads 0 is impossible here"),
        (native_arch().name, Wishes(threads=1 << 20), "so give at most "),
        ("sm_90", Wishes(threads=1), "--threads is of CPU kernels; leave it out for sm_90"),
        ("sm_100", Wishes(device="h200"), "device H200 is sm_90, not sm_100"),
        ("sm_90", Wishes(device="H300"), r"device 'H300' is not known; the nearest name is h800-sxm \(sm_90\)"),
    ],
)
def test_a_wish_that_cannot_be_granted_is_one_sentence(arch: str, wishes: Wishes, complaint: str) -> None:
    with pytest.raises(TilewrightError, match=complaint):
        find_target(ARCHS[arch], wishes, refuse)


def test_a_cpu_of_another_kind_is_no_target() -> None:
    foreign = next(each for each in CPU_ARCHS.values() if each.machine != native_arch().machine)
    with pytest.raises(TilewrightError, match=f"arch {foreign.name} does not run on this machine"):
        find_target(foreign, Wishes(), refuse)


def test_a_device_that_is_there_comes_before_the_prediction_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = registry._TARGETS["cuda"]
    monkeypatch.setitem(registry._TARGETS, "cuda", (f"{__name__}:HereAlone", *predicted))

    def found(name: str) -> Target:
        return find_target(ARCHS["sm_90"], Wishes(device=name), refuse)

    assert type(found("h200")) is HereAlone
    assert type(found("h100-sxm")) is PredictedTarget


def test_a_device_that_is_a_product_s_is_kept_under_its_key() -> None:
    key = "h100-sxm"
    with executing(("sm_80", "sm_90"), name="NVIDIA H100 80GB HBM3", sm_count=132, memory_bytes=80 << 30):
        target = find_target(ARCHS["sm_90"], Wishes(), refuse)
        assert isinstance(target, DeviceTarget)
        assert (target.device.key, target.device.name, target.present.index) == (key, "NVIDIA H100 80GB HBM3", 1)
        assert isinstance(find_target(ARCHS["sm_90"], Wishes(device=key), refuse), DeviceTarget)
        for wishes in (Wishes(predict=True), Wishes(device="h200")):
            assert isinstance(find_target(ARCHS["sm_90"], wishes, refuse), PredictedTarget)
        assert isinstance(find_target(ARCHS["sm_100"], Wishes(), refuse), PredictedTarget)


def test_a_location_says_threads_where_they_are_a_choice() -> None:
    assert str(Location("here", 2)) == "2 threads on here"
    assert str(Location("here", 1)) == "1 thread on here"
    assert str(Location("h200", 0)) == "on h200"


def test_the_registry_loads_no_target_before_it_is_asked_for() -> None:
    code = (
        "import sys; import tilewright.tuner.targets.registry; "
        "print([name for name in sys.modules if name.startswith('tilewright.tuner.targets.')])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "targets.base" in told
    assert "targets.cpu" not in told
    assert "targets.predicted" not in told
    assert "targets.device" not in told
