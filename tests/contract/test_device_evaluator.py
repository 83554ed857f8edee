"""The evaluator of a device, on the executing driver: its contract, and kernels that do everything wrong.

What this shows is that it checks, races and survives; the times are those of the stand-in's clock, and no binary runs.
"""

from __future__ import annotations

import mmap
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from covering import FULL
from device_kernels import ARCH, DeviceKernelMaker
from evaluation_kernels import OP, SIGNATURE, problem
from executing import ExecutingDriver, executing
from patience import PATIENCE_S, wait_until
from test_evaluator_contract import MeasuringContract

from tilewright.codegen.backends.base import BuiltFile
from tilewright.codegen.recipe.model import Argument, Guard
from tilewright.codegen.workers.channel import Message
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.cuda.driver import Driver, DriverError
from tilewright.runtime.launchers.cuda.present import present_devices
from tilewright.runtime.launchers.cuda.timing import Stopwatch
from tilewright.tuner.evaluation.begun import Begun
from tilewright.tuner.evaluation.device.conditions import Monitor
from tilewright.tuner.evaluation.device.evaluator import DeviceEvaluator
from tilewright.tuner.evaluation.device.session import DeviceSession
from tilewright.tuner.evaluation.device.worker import EVENTS, GRAPH_REPLAY, Worker
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.evaluation.statistics import MIN_SAMPLES
from tilewright.tuning_db.records import Outcome

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow  # the first launch starts the emulator

CALL_US, SLOW_US = 250.0, 5000.0
MEMORY_BYTES = 4 << 20
L2_BYTES = 1 << 10
"""So small that races rotate one set of inputs, and that of one row two."""


@pytest.fixture(scope="module")
def driver() -> Iterator[ExecutingDriver]:
    with executing(("sm_90",), memory_bytes=MEMORY_BYTES, l2_bytes=L2_BYTES) as made:
        made.costs.update({f"run_{name}": CALL_US for name in ("right", *(each for each, *_ in FAULTS.values()))})
        made.costs["run_slow_"] = SLOW_US
        yield made


@pytest.fixture(scope="module")
def make(driver: ExecutingDriver, tmp_path_factory: pytest.TempPathFactory) -> DeviceKernelMaker:
    return DeviceKernelMaker(driver, tmp_path_factory.mktemp("kernels"))


@contextmanager
def evaluator(driver: ExecutingDriver, time_limit_s: float = PATIENCE_S) -> Iterator[DeviceEvaluator]:
    (device,) = present_devices(Driver(str(driver.path)))
    with DeviceEvaluator(OP, SIGNATURE, device, ARCH, seed=1, time_limit_s=time_limit_s) as made:
        yield made


@pytest.fixture(scope="module")
def on_device(driver: ExecutingDriver) -> Iterator[DeviceEvaluator]:
    with evaluator(driver) as made:
        yield made


class TestDeviceEvaluator(MeasuringContract):
    enough_s = 60.0  # launches take the emulator as long as they take, and a race ends when its times are known

    @pytest.fixture
    def subject(self, on_device: DeviceEvaluator) -> DeviceEvaluator:
        return on_device

    @pytest.fixture
    def right(self, make: DeviceKernelMaker) -> BuiltKernel:
        return make()

    @pytest.fixture
    def packed(self, make: DeviceKernelMaker) -> BuiltKernel:
        return make(weight="bf16")

    @pytest.fixture
    def slow(self, make: DeviceKernelMaker) -> BuiltKernel:
        return make("slow_")

    @pytest.fixture
    def wrong(self, make: DeviceKernelMaker) -> BuiltKernel:
        return make(rows="rows - 1")

    @pytest.fixture
    def guarded(self, make: DeviceKernelMaker) -> BuiltKernel:
        return make(guards=(Guard("rows", 8),))

    def test_times_are_the_clock_s_and_say_how_they_were_taken(
        self, subject: DeviceEvaluator, right: BuiltKernel, slow: BuiltKernel
    ) -> None:
        first, second = subject.evaluate([right, slow], problem(), budget_s=0.1, finalists=True)
        assert first.median_us == pytest.approx(CALL_US, rel=0.02)
        assert second.median_us == pytest.approx(SLOW_US, rel=0.02)
        assert first.conditions == {"method": GRAPH_REPLAY, "driver": "13.0", "throttled": [], "repeats": 0}

    def test_a_race_rotates_so_many_sets_of_inputs_that_they_exceed_the_cache(
        self, driver: ExecutingDriver, subject: DeviceEvaluator, right: BuiltKernel
    ) -> None:
        subject.evaluate([right], problem(1), budget_s=0.0)
        before = len(driver.executed)
        subject.evaluate([right], problem(1), budget_s=0.0)
        sets, blocks = 2, 1 + 1 + MIN_SAMPLES  # one to learn how long it takes, one that is recorded, and a lap
        assert len(subject._data(problem(1)).sets) == sets
        assert len(driver.executed) - before == 1 + sets * blocks


CRASHED, WRONG, TIMED_OUT, REJECTED = Outcome.CRASHED, Outcome.WRONG, Outcome.TIMED_OUT, Outcome.REJECTED

FAULTS: dict[str, tuple[str, Mapping[str, Any], Outcome, str]] = {
    "hang": ("hangs", {}, TIMED_OUT, "no result after 5 s"),
    "illegal access": ("stray", {}, CRASHED, r"cuStreamSynchronize: .*\(700, "),
    "crash": ("crash", {}, CRASHED, "killed by SIGSEGV"),
    "out of memory at its launch": ("memry", {}, REJECTED, r"was not launched on .*\(2, "),
    "wrong in one element": ("wrong", {}, WRONG, r"out\[\d+, \d+\] is .* expected .*rows="),
    "needs a workspace beyond the device": (
        "right",
        {"workspace_bytes": str(MEMORY_BYTES)},
        REJECTED,
        f"needs a workspace of {MEMORY_BYTES} bytes, which the device does not have",
    ),
    "damaged binary": ("right", {"damage": True}, REJECTED, r"run_right cannot be loaded on stand-in of sm_90 .*image"),
    "binary of another arch": ("right", {"arch": 80}, REJECTED, r"cannot be loaded on stand-in of sm_90 .*arch"),
    "writes just past its output": (
        "right",
        {"rows": "rows + 1"},
        WRONG,
        r"wrote outside its out: 0 bytes before and \d+ bytes after it",
    ),
    "writes to an input": (
        "right",
        {"swapped": ("out", Argument("tensor", "weight"))},
        WRONG,
        r"wrote to its input weight: \d+ bytes of it changed",
    ),
    "writes NaN": (
        "right",
        {"swapped": ("x", Argument("workspace")), "workspace_bytes": "rows * 64"},
        WRONG,
        r"out\[0, 0\] (is nan|was never written)",  # a NaN keeps the bits of the one that it came of
    ),
    "leaves a row out": ("right", {"rows": "rows - 1"}, WRONG, "was never written"),
    "other parameters than its recipe passes": (
        "right",
        {"swapped": ("x", None)},
        REJECTED,
        "the binary of run_right takes 7 parameters, and its recipe passes 6; tune again",
    ),
}
"""What the kernel's entry is called, what its maker is told, and what becomes of it."""
KINDS = {
    "hangs": "hang",
    "stray": "illegal_access",
    "crash": "crash",
    "memry": "out_of_memory",
    "wrong": "wrong_element",
}


@pytest.fixture(scope="module")
def faulty(driver: ExecutingDriver, on_device: DeviceEvaluator, make: DeviceKernelMaker) -> Iterator[DeviceEvaluator]:
    """An evaluator that waits for five seconds, of launches that the emulator knows already."""
    assert all(each.median_us for each in on_device.evaluate([make(), make(weight="bf16")], problem(), budget_s=0.0))
    with evaluator(driver, time_limit_s=5.0) as made:
        yield made


FEW = ("hang", "illegal access", "needs a workspace beyond the device", "damaged binary", "writes just past its output")
"""What is tried by default; all with ``TILEWRIGHT_FULL=1``."""


@pytest.mark.parametrize("name", FAULTS if FULL else FEW)
def test_a_fault_costs_one_evaluation(
    driver: ExecutingDriver, faulty: DeviceEvaluator, make: DeviceKernelMaker, name: str
) -> None:
    entry, told, outcome, reason = FAULTS[name]
    if entry in KINDS:
        driver.fail(f"run_{entry}", KINDS[entry])  # type: ignore[arg-type]
    kernels = [make(), make(entry, **told), make(weight="bf16")]
    good, bad, packed = faulty.evaluate(kernels, problem(), budget_s=0.0)
    driver.mend()
    assert (bad.outcome, bad.samples_us, bad.median_us) == (outcome, (), None), bad.message
    assert re.search(reason, bad.message), bad.message
    assert "\n" not in bad.message
    assert (good.outcome, packed.outcome) == (Outcome.OK, Outcome.OK), (good.message, packed.message)
    assert good.median_us == packed.median_us == pytest.approx(CALL_US, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "outcome", "reason"),
    [
        ("illegal_access", CRASHED, r"\(700, .*when timed"),
        ("wrong_element", WRONG, "after it was timed; it was right before"),
        ("crash", CRASHED, "SIGSEGV .*when timed"),
        ("hang", TIMED_OUT, "no result after 5 s .*when timed"),
    ][: None if FULL else 2],
)
def test_a_race_goes_on_without_a_kernel_that_fails_in_it(
    driver: ExecutingDriver, faulty: DeviceEvaluator, make: DeviceKernelMaker, kind: Any, outcome: Outcome, reason: str
) -> None:
    late = make("late_", guards=(Guard("rows", {"illegal_access": 1, "crash": 2, "hang": 4}.get(kind, 8)),))
    assert faulty.evaluate([late], problem(), budget_s=0.0)[0].outcome is Outcome.OK  # it is checked from now on
    driver.fail("run_late_", kind)
    good, bad, packed = faulty.evaluate([make(), late, make(weight="bf16")], problem(), budget_s=0.0)
    driver.mend()
    assert bad.outcome is outcome, bad.message
    assert re.search(reason, bad.message), bad.message
    assert (good.outcome, packed.outcome) == (Outcome.OK, Outcome.OK)


def test_a_worker_that_is_killed_from_outside_costs_no_trial(faulty: DeviceEvaluator, make: DeviceKernelMaker) -> None:
    faulty.evaluate([make()], problem(), budget_s=0.0)
    before = faulty.worker_pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    evaluations = faulty.evaluate([make(), make(weight="bf16")], problem(), budget_s=0.0)
    assert [each.outcome for each in evaluations] == [Outcome.OK, Outcome.OK]
    assert faulty.worker_pid not in (None, before)


def test_a_worker_that_is_killed_while_it_races_costs_no_trial(
    faulty: DeviceEvaluator, make: DeviceKernelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    time = DeviceSession.time

    def kill_once(self: DeviceSession, blocks: Any, repeats: int) -> list[float]:
        if not killed and self.worker_pid is not None:
            killed.append(self.worker_pid)
            os.kill(self.worker_pid, signal.SIGKILL)
        return time(self, blocks, repeats)

    monkeypatch.setattr(DeviceSession, "time", kill_once)
    evaluations = faulty.evaluate([make(), make(weight="bf16")], problem(), budget_s=0.0)
    assert killed
    assert [each.outcome for each in evaluations] == [Outcome.OK, Outcome.OK]


@pytest.mark.parametrize(("slow", "repeats"), [(1, 1), (9, 2)], ids=["once", "all the time"])
def test_a_race_during_which_the_device_was_slowed_down_is_run_again(
    on_device: DeviceEvaluator, make: DeviceKernelMaker, monkeypatch: pytest.MonkeyPatch, slow: int, repeats: int
) -> None:
    slowed = iter([*[True] * slow, False])
    monkeypatch.setattr(Monitor, "slowed_down", property(lambda _: next(slowed)))
    (evaluation,) = on_device.evaluate([make()], problem(), budget_s=0.0)
    assert evaluation.median_us == pytest.approx(CALL_US, rel=0.02)
    assert evaluation.conditions["repeats"] == repeats


def test_what_is_no_cubin_is_refused(faulty: DeviceEvaluator, make: DeviceKernelMaker) -> None:
    kernel = make()
    other = replace(kernel, key="other", files=(BuiltFile(kernel.files[0].path, "hsaco"),))
    (evaluation,) = faulty.evaluate([other], problem(), budget_s=0.0)
    assert (evaluation.outcome, evaluation.message) == (
        REJECTED,
        "kernel other has hsaco artifacts; a CUDA driver loads cubin",
    )


def test_the_worker_ends_with_the_evaluator(driver: ExecutingDriver, make: DeviceKernelMaker) -> None:
    with evaluator(driver) as made:
        made.evaluate([make()], problem(), budget_s=0.0)
        pid = made.worker_pid
    assert pid is not None
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the worker did not end")


def test_a_device_that_cannot_be_opened_is_a_sentence(driver: ExecutingDriver) -> None:
    (device,) = present_devices(Driver(str(driver.path)))
    with pytest.raises(TilewrightError, match="the device cannot be opened for measuring: cuDeviceGet: "):
        DeviceEvaluator(OP, SIGNATURE, replace(device, index=7), ARCH)


def test_weights_beyond_the_device_are_refused(driver: ExecutingDriver) -> None:
    (device,) = present_devices(Driver(str(driver.path)))
    with pytest.raises(TilewrightError, match=r"is too large for stand-in of sm_90: weights take .*; raise --tp"):
        DeviceEvaluator(OP, replace(SIGNATURE, n=1 << 10, k=1 << 10), device, ARCH)


class _InThisProcess:
    """A worker that answers in this process, where what it calls can be replaced."""

    def __init__(self, session: DeviceSession) -> None:
        self._begun = Begun()
        staging = mmap.mmap(session._staging_fd, os.fstat(session._staging_fd).st_size)
        self._worker = Worker(self._begun, staging, 0)
        self.pid = os.getpid()

    @property
    def program(self) -> int:
        return self._begun.program

    def request(self, message: Message, *, limit_s: float, descriptors: object = ()) -> Message:
        del limit_s, descriptors
        return self._worker.handle(message, [])

    def close(self) -> None:
        os.close(self._begun.fd)


def _in_this_process(session: DeviceSession) -> _InThisProcess:
    return _InThisProcess(session)


def _record_nothing(*_: object) -> None:
    raise DriverError("cuStreamBeginCapture: not supported", 801)


def test_where_nothing_can_be_recorded_calls_are_timed_one_by_one(
    driver: ExecutingDriver, make: DeviceKernelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceSession, "_new_worker", _in_this_process)
    monkeypatch.setattr(Stopwatch, "record", _record_nothing)
    with evaluator(driver) as made:
        first, second = made.evaluate([make(), make("slow_")], problem(), budget_s=0.0)
    assert first.conditions["method"] == second.conditions["method"] == EVENTS
    assert first.median_us == pytest.approx(CALL_US, rel=0.05)
    assert second.median_us == pytest.approx(SLOW_US, rel=0.05)
