import shutil

import pytest

from tilewright.errors import TilewrightError
from tilewright.tuner.report import roofline
from tilewright.tuner.report.roofline import Roofline, measure_roofline


@pytest.fixture(autouse=True)
def forget():
    measure_roofline.cache_clear()
    yield
    measure_roofline.cache_clear()


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(roofline, "BUFFER_BYTES", 8 << 20)


def test_time_is_set_by_the_scarcer_resource():
    ceilings = Roofline(threads=2, peak_gflops=100.0, bandwidth_gbps=20.0)
    assert ceilings.time_us(flops=2e9, bytes_moved=0) == pytest.approx(20_000)
    assert ceilings.time_us(flops=2e9, bytes_moved=1e9) == pytest.approx(50_000)


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("compiler", ["clang++", "clang++-14", "g++"])
def test_measures_with_each_compiler(compiler, monkeypatch):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv("CXX", compiler)
    measured = measure_roofline(2)
    assert measured.threads == 2
    assert measured.peak_gflops > 0.1
    assert measured.bandwidth_gbps > 0.1
    assert measure_roofline(2) is measured


def test_no_threads_are_refused():
    with pytest.raises(TilewrightError, match="threads=0"):
        measure_roofline(0)


def test_a_compiler_that_fails_is_named_with_its_words(monkeypatch, tmp_path):
    broken = tmp_path / "broken-cxx"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && echo broken 1.0 && exit\necho 'no such header' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(TilewrightError, match="`broken-cxx` failed: no such header"):
        measure_roofline(1)
