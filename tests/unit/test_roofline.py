import shutil

import pytest

from tilewright.errors import TilewrightError
from tilewright.tuner.report import roofline
from tilewright.tuner.report.roofline import Achieved, Ceilings, Roofline, ceilings, format_share, measure_roofline


@pytest.fixture(autouse=True)
def forget():
    ceilings.cache_clear()
    yield
    ceilings.cache_clear()


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(roofline, "LARGEST_BUFFER_BYTES", 8 << 20)


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


class Moments:
    """A probe that finds the bandwidths of a list, in GB/s, one moment after the other."""

    def __init__(self, *bandwidths_gbps):
        self.left = list(bandwidths_gbps)

    def __call__(self, threads):
        return Roofline(threads, peak_gflops=100.0, bandwidth_gbps=self.left.pop(0))


def moved(gbps):
    """A megabyte read at so many GB/s."""
    return Achieved(flops=0.0, bytes_moved=1e6, time_us=1e3 / gbps)


def test_a_share_over_105_percent_measures_the_ceilings_again():
    probe = Moments(10.0, 20.0, 99.0)
    known = Ceilings(2, probe)
    assert known.roofline.bandwidth_gbps == 10.0
    assert known.explaining([moved(5.0), moved(15.0)]).bandwidth_gbps == 20.0
    assert probe.left == [99.0]
    assert known.roofline.share(moved(15.0)) == pytest.approx(0.75)


def test_what_is_within_105_percent_needs_no_other_moment():
    known = Ceilings(2, Moments(10.0))
    assert known.explaining([moved(10.4)]).bandwidth_gbps == 10.0
    assert known.explaining([]).bandwidth_gbps == 10.0


def test_the_highest_ceilings_of_all_moments_are_kept():
    known = Ceilings(2, Moments(10.0, 30.0, 20.0))
    assert [known.measure_again().bandwidth_gbps for _ in range(3)] == [10.0, 30.0, 30.0]


def test_what_no_moment_explains_is_given_up_and_said_so():
    probe = Moments(10.0, 11.0, 9.0, 12.0, 99.0)
    known = Ceilings(2, probe)
    for _ in range(2):
        assert known.explaining([moved(1000.0)]).bandwidth_gbps == 12.0
    assert probe.left == [99.0]
    assert format_share(known.roofline.share(moved(1000.0))) == ">105%"
    assert format_share(known.roofline.share(moved(6.0))) == "50%"
