"""The executing driver of tests: launches that compute, a clock of its own, and faults that are asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from ctypes import byref, c_size_t, c_uint64, c_void_p
from pathlib import Path

import numpy as np
import pytest
import torch
from executing import ExecutingDriver, executing
from posing import pose, values
from standin_device import COUNT, LAST, Device, X
from standin_kernels import ENTRIES, SOURCE, prepared

from tilewright.errors import TilewrightError

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow  # the first launch starts the emulator

SUCCESS, OUT_OF_MEMORY, NOT_READY, ILLEGAL_ADDRESS = 0, 2, 600, 700
RELAXED = 2
TESTS = Path(__file__).parents[1]


@pytest.fixture
def cuda() -> Iterator[ExecutingDriver]:
    with executing(("sm_90",), memory_bytes=1 << 20) as made:
        made.know(prepared("copy", "sm_90").image, SOURCE, (ENTRIES["copy"],))
        yield made


@pytest.fixture
def device(cuda: ExecutingDriver) -> Device:
    return Device(cuda.path, prepared("copy", "sm_90").image)


def test_a_launch_computes_on_memory_of_the_driver(cuda: ExecutingDriver, device: Device) -> None:
    x, out = device.upload(X), device.upload(np.zeros_like(X))
    device.launch(x, out)
    assert device.call("cuCtxSynchronize") == SUCCESS
    np.testing.assert_array_equal(device.download(out), X + LAST)
    np.testing.assert_array_equal(device.download(x), X)
    assert cuda.executed == [("copy", (3, 1, 1))]
    assert [each.name for each in cuda.standin.launches] == [b"copy"]


def test_a_launch_computes_on_posed_tensors_and_leaves_what_lies_beside(device: Device) -> None:
    x, out = pose(torch.from_numpy(X.copy())), pose(torch.full((COUNT + 20,), -1.0))
    device.launch(x.data_ptr(), values(out)[10:].data_ptr())
    expected = np.full(COUNT + 20, -1.0, np.float32)
    expected[10:-10] = X + LAST
    np.testing.assert_array_equal(values(out).numpy(), expected)


def test_threads_may_launch_at_once(device: Device) -> None:
    x = pose(torch.from_numpy(X.copy()))
    outs = [pose(torch.zeros(COUNT)) for _ in range(4)]

    def launch(out: torch.Tensor, stream: int) -> None:
        device.launch(x.data_ptr(), out.data_ptr(), stream)

    threads = [threading.Thread(target=launch, args=(out, device.stream())) for out in outs]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for out in outs:
        np.testing.assert_array_equal(values(out).numpy(), X + LAST)


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "copy.cubin"
    path.write_bytes(prepared("copy", "sm_90").image)
    return path


def child_of(cuda: ExecutingDriver, image_file: Path) -> subprocess.Popen[str]:
    """A process that launches, says so, and says what came out."""
    words = [sys.executable, "-m", "standin_device", str(cuda.path), str(image_file)]
    return subprocess.Popen(words, cwd=TESTS, stdout=subprocess.PIPE, text=True)


def test_children_launch_on_the_same_devices_and_may_crash_or_hang(cuda: ExecutingDriver, image_file: Path) -> None:
    said, _ = child_of(cuda, image_file).communicate()
    assert said.split() == ["launched", str(float((X + LAST).sum()))]

    cuda.fail("copy", "hang", times=1)
    with child_of(cuda, image_file) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "launched\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        child.kill()

    cuda.fail("copy", "crash", times=1)
    child = child_of(cuda, image_file)
    assert child.communicate()[0] == ""
    assert child.returncode == -signal.SIGSEGV
    assert len(cuda.executed) == 3


def test_time_is_what_launches_cost(cuda: ExecutingDriver, device: Device) -> None:
    x, out, stream = device.upload(X), device.upload(X), device.stream()
    cuda.costs["copy"] = lambda launch: launch.grid[0] * 10.0
    before = device.event(stream)
    for _ in range(3):
        device.launch(x, out, stream)
    after = device.event(stream)
    assert device.call("cuEventQuery", after) == NOT_READY
    assert device.call("cuStreamQuery", c_void_p(stream)) == NOT_READY
    assert device.elapsed_us(before, after) == pytest.approx(3 * 30 + 2)  # and until the first was enqueued
    cuda.costs["copy"] = 500.0
    before = device.event(stream)
    device.launch(x, out, stream, count=100)
    assert device.elapsed_us(before, device.event(stream)) == pytest.approx(502)


def test_costs_that_nobody_named_grow_with_grid_and_bytes(device: Device) -> None:
    x, out = device.upload(np.zeros(4096, np.float32)), device.upload(np.zeros(4096, np.float32))
    times = []
    for count in (128, 4096):
        before = device.event()
        device.launch(x, out, count=count)
        times.append(device.elapsed_us(before, device.event()))
    assert times[0] < times[1]


def test_a_graph_runs_when_it_is_replayed(cuda: ExecutingDriver, device: Device) -> None:
    x, out, stream = device.upload(X), device.upload(np.zeros_like(X)), device.stream()
    cuda.costs["copy"] = 7.0
    graph, replay = c_void_p(), c_void_p()
    assert device.call("cuStreamBeginCapture_v2", c_void_p(stream), RELAXED) == SUCCESS
    for _ in range(5):
        device.launch(x, out, stream)
    assert device.driver.is_capturing(stream)
    assert device.call("cuMemsetD8Async", c_uint64(x), 0, c_size_t(4), c_void_p(stream)) == SUCCESS
    assert device.call("cuStreamEndCapture", c_void_p(stream), byref(graph)) == SUCCESS
    assert device.call("cuGraphInstantiateWithFlags", byref(replay), graph, c_uint64(0)) == SUCCESS
    assert device.call("cuGraphDestroy", graph) == SUCCESS
    assert (cuda.executed, list(device.download(out, 3))) == ([], [0, 0, 0])
    before = device.event(stream)
    assert device.call("cuGraphLaunch", replay, c_void_p(stream)) == SUCCESS
    np.testing.assert_array_equal(device.download(out), X + LAST)
    assert device.download(x, 1)[0] == 0
    assert device.elapsed_us(before, device.event(stream)) == pytest.approx(4 + 5 * 7 + 1, abs=0.1)
    assert device.call("cuGraphExecDestroy", replay) == SUCCESS


def test_memory_is_as_large_as_it_was_said_to_be(device: Device) -> None:
    free, total, made = c_size_t(), c_size_t(), c_uint64()
    assert device.call("cuMemGetInfo_v2", byref(free), byref(total)) == SUCCESS
    assert (free.value, total.value) == (1 << 20, 1 << 20)
    assert device.call("cuMemAlloc_v2", byref(made), c_size_t(1 << 19)) == SUCCESS
    assert device.call("cuMemAlloc_v2", byref(c_uint64()), c_size_t((1 << 19) + 1)) == OUT_OF_MEMORY
    assert device.call("cuMemFree_v2", made) == SUCCESS
    assert device.call("cuMemAlloc_v2", byref(made), c_size_t(1 << 20)) == SUCCESS


def test_one_element_is_wrong_or_memory_is_short_where_that_is_asked_for(cuda: ExecutingDriver, device: Device) -> None:
    x, out = device.upload(X), device.upload(np.zeros_like(X))
    cuda.fail("copy", "wrong_element", after=1, times=1)
    found = []
    for _ in range(3):
        device.launch(x, out)
        found.append(device.download(out))
    assert [int((each != X + LAST).sum()) for each in found] == [0, 1, 0]
    cuda.fail("copy", "out_of_memory", times=1)
    with pytest.raises(TilewrightError, match=r"copy was not launched .*CUDA_ERROR_OUT_OF_MEMORY"):
        device.launch(x, out)
    device.launch(x, out)
    cuda.fail("copy", "illegal_access")
    device.launch(x, out)
    assert device.call("cuStreamSynchronize", None) == ILLEGAL_ADDRESS
    assert device.call("cuMemAlloc_v2", byref(c_uint64()), c_size_t(16)) == ILLEGAL_ADDRESS
    with pytest.raises(TilewrightError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.launch(x, out)


def freed(device: Device) -> tuple[int, int]:
    x = device.upload(X)
    assert device.call("cuMemFree_v2", c_uint64(x)) == SUCCESS
    return x, COUNT


@pytest.mark.parametrize(
    ("aim", "complaint"),
    [
        (freed, "where nothing is allocated"),
        (lambda _: (64, COUNT), "an argument points to 0x40, where nothing is allocated"),
        (lambda device: (device.upload(X), COUNT + 1), "MemoryFaultError: reads bytes 1024 to 1204 of memory"),
    ],
    ids=["freed memory", "stray pointer", "beyond the end"],
)
def test_what_belongs_to_nothing_is_not_touched(cuda, device, aim, complaint) -> None:
    out = device.upload(np.zeros(COUNT + 128, np.float32))
    x, count = aim(device)
    device.launch(x, out, count=count)
    assert device.call("cuCtxSynchronize") == ILLEGAL_ADDRESS
    (said,) = cuda.complaints
    assert complaint in said
    cuda.complaints.clear()


def test_a_launch_that_went_wrong_is_not_passed_over() -> None:
    driver = executing()
    cuda = driver.__enter__()
    cuda.know(prepared("copy", "sm_90").image, SOURCE, (ENTRIES["copy"],))
    Device(cuda.path, prepared("copy", "sm_90").image).launch(64, 64)
    with pytest.raises(AssertionError, match="where nothing is allocated"):
        driver.__exit__(None, None, None)


def test_a_kernel_that_nobody_knows_is_refused() -> None:
    with executing() as cuda:
        device = Device(cuda.path, prepared("copy", "sm_90").image)
        x = device.upload(X)
        with pytest.raises(TilewrightError, match="nobody said which source its cubin was compiled from"):
            device.launch(x, x)
        cuda.complaints.clear()
