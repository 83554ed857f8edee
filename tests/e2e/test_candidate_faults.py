"""Kernels that do everything wrong: each costs its own evaluation, and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluation_kernels import KernelMaker, evaluator, needs_compiler, problem
from patience import wait_until

from tilewright.codegen.ops.attention.declaration import Attention
from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.moe_gemm.declaration import MoeGemm
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.cpu.evaluator import CpuEvaluator
from tilewright.tuning_db.records import Outcome

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> KernelMaker:
    return KernelMaker(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def subject() -> Iterator[CpuEvaluator]:
    with evaluator(time_limit_s=1.0) as made:
        yield made


CRASHED, WRONG, TIMED_OUT, REJECTED = Outcome.CRASHED, Outcome.WRONG, Outcome.TIMED_OUT, Outcome.REJECTED

FAULTS = {
    "segfault": ({"before": "*(volatile int *)8 = 1;"}, CRASHED, "SIGSEGV"),
    "abort": ({"before": 'fputs("no luck\\n", stderr); abort();'}, CRASHED, "SIGABRT: no luck"),
    "exit": ({"before": "exit(0);"}, CRASHED, "ended the process with status 0"),
    "exit at once": ({"before": "_exit(3);"}, CRASHED, "ended the process with status 3"),
    "signal": ({"before": "raise(SIGTERM);"}, CRASHED, "SIGTERM"),
    "kills itself": ({"before": "kill(getpid(), SIGKILL);"}, CRASHED, "SIGKILL"),
    "hang": ({"before": "for (;;) pause();"}, TIMED_OUT, "no result after 1 s"),
    "spin": ({"before": "for (volatile int i = 0;; i++);"}, TIMED_OUT, "no result after 1 s"),
    "stops itself": ({"before": "raise(SIGSTOP);"}, TIMED_OUT, "no result after 1 s"),
    "hang after its work": ({"after": "for (;;) pause();"}, TIMED_OUT, "no result after 1 s"),
    "allocates without end": ({"before": "for (;;) memset(malloc(1 << 20), 1, 1 << 20);"}, CRASHED, "SIGSEGV"),
    "closes everything": ({"before": "for (int i = 0; i < 4096; i++) close(i);"}, CRASHED, "killed|ended|connection"),
    "closes everything and runs on": (
        {"before": "for (int i = 0; i < 4096; i++) close(i); for (;;) pause();"},
        CRASHED,
        "broke its connection",
    ),
    "talks to the tuner": (
        {"before": 'for (int i = 3; i < 4096; i++) write(i, "\\3\\0\\0\\0{}}", 7); for (;;) pause();'},
        CRASHED,
        "connection",
    ),
    "writes far past its output": ({"after": "memset(out + size, 0, 4096);"}, CRASHED, "SIGSEGV"),
    "writes just past its output": ({"after": "((char *)(out + size))[0] = 0;"}, "any", "outside its out|SIGSEGV"),
    "writes before its output": ({"after": "out[-1] = 0;"}, WRONG, "outside its out: 4 bytes before"),
    "writes past its workspace": (
        {"after": "((char *)workspace)[90] = 1;", "workspace_bytes": "90"},
        WRONG,
        "outside its workspace: 0 bytes before and 1 bytes after",
    ),
    "writes to its inputs": ({"before": "((float *)a[0])[0] = 0;"}, CRASHED, "SIGSEGV"),
    "writes to the weights": ({"before": "((float *)a[1])[5] = 0;"}, CRASHED, "SIGSEGV"),
    "writes to packed weights": ({"before": "((float *)a[1])[5] = 0;", "columns": 8}, CRASHED, "SIGSEGV"),
    "writes nothing": ({"before": "return 0;"}, WRONG, "was never written"),
    "writes NaN": ({"after": "out[size - 1] = NAN;"}, WRONG, r"out\[0, 23\] is nan"),
    "wrong in one element": ({"after": "out[size / 2] *= 1.0001f;"}, WRONG, r"out\[0, 12\] is .* expected"),
    "right for even sizes only": ({"after": "if (rows % 2) out[0] = 0;"}, WRONG, r"out\[0, 0\] is 0"),
    "right for small sizes only": ({"after": "if (rows > 32) out[0] = 0;"}, WRONG, "rows=37"),
    "wrong on the measured problem only": ({"after": "if (rows == 16) out[0] = 0;"}, WRONG, "rows=16"),
    "error code": ({"before": "return 7;"}, WRONG, "returned the error code 7"),
    "crashes when loaded": ({"on_load": "abort();"}, CRASHED, "SIGABRT while it was loaded"),
    "hangs when loaded": ({"on_load": "for (;;) pause();"}, TIMED_OUT, "no result after 1 s while it was loaded"),
    "another ABI": ({"abi": 77}, REJECTED, "has ABI version 77, its recipe says 1"),
    "no such entry": ({"entry": "absent"}, REJECTED, "has no such entry"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_one_evaluation(subject: CpuEvaluator, make: KernelMaker, name: str) -> None:
    code, outcome, reason = FAULTS[name]
    neighbour, faulty = make(), make(**code)
    good, bad, packed = subject.evaluate([neighbour, faulty, make(columns=16)], problem(), budget_s=0.05)
    assert outcome in ("any", bad.outcome), bad.message
    assert bad.outcome is not Outcome.OK
    assert re.search(reason, bad.message), bad.message
    assert (good.outcome, packed.outcome) == (Outcome.OK, Outcome.OK)
    assert good.median_us is not None


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        ({"before": "if (calls > 12) abort();"}, CRASHED, "SIGABRT"),
        ({"before": "if (calls > 12) for (;;) pause();"}, TIMED_OUT, "no result after 1 s"),
        ({"before": "if (calls > 12) return 9;"}, WRONG, "error code 9"),
    ],
    ids=["crash", "hang", "error code"],
)
def test_a_race_goes_on_without_a_kernel_that_fails_in_it(
    subject: CpuEvaluator, make: KernelMaker, code: dict[str, str], outcome: Outcome, reason: str
) -> None:
    # Checking takes ten calls in a worker, and the shortest race sixteen more.
    good, bad, packed = subject.evaluate([make(), make(**code), make(columns=16)], problem(), budget_s=0.05)
    assert bad.outcome is outcome, bad.message
    assert re.search(reason, bad.message), bad.message
    assert bad.samples_us == ()
    assert len(good.samples_us) >= 16
    assert packed.outcome is Outcome.OK


def test_a_finalist_is_checked_once_more(subject: CpuEvaluator, make: KernelMaker) -> None:
    (bad,) = subject.evaluate([make(after="if (calls > 12) out[3] = 0;")], problem(), budget_s=0.0)
    assert bad.outcome is WRONG, bad.message
    assert "after it was timed; it was right before" in bad.message
    assert bad.samples_us == ()


def test_a_worker_killed_once_costs_no_kernel(make: KernelMaker) -> None:
    moments = random.Random(7)
    with evaluator() as subject:
        for number in range(20):
            kernels = [make(f"(void){number};"), make(f"(void){number};", columns=16)]
            killer = threading.Timer(moments.uniform(0, 0.08), kill_worker, [subject])
            killer.start()
            evaluations = subject.evaluate(kernels, problem(), budget_s=0.03)
            killer.join()
            assert [e.outcome for e in evaluations] == [Outcome.OK, Outcome.OK], [e.message for e in evaluations]


def kill_worker(subject: CpuEvaluator) -> None:
    if (pid := subject.worker_pid) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


_TUNER = """
import sys, threading, time
from pathlib import Path
from evaluation_kernels import KernelMaker, evaluator, problem
kernel = KernelMaker(Path(sys.argv[1]))("for (;;);")
with evaluator(time_limit_s=100) as subject:
    print(subject.worker_pid, flush=True)
    subject.evaluate([kernel], problem(), budget_s=1)
"""


def test_the_worker_dies_with_the_tuner(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _TUNER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as tuner:
        assert tuner.stdout is not None
        worker = int(tuner.stdout.readline())
        cpu_ticks = wait_until_it_spins(worker)
        assert cpu_ticks > 0
        tuner.kill()
    wait_until(lambda: state_of(worker) in (None, "Z"), "the worker outlived the tuner")


def wait_until_it_spins(pid: int) -> int:
    """CPU ticks of a process, once they are more than its start-up takes."""

    def ticks() -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])

    wait_until(lambda: ticks() >= 50, "the kernel never ran")
    return ticks()


def state_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_a_closed_evaluator_leaves_nothing_behind(make: KernelMaker) -> None:
    with evaluator() as warm_up:
        warm_up.evaluate([make()], problem(), budget_s=0.0)
    before = open_files()
    with evaluator(time_limit_s=1.0) as subject:
        subject.evaluate([make(), make("abort();"), make(columns=8)], problem(), budget_s=0.0)
        pid = subject.worker_pid
    assert pid is not None
    assert state_of(pid) is None
    assert open_files() == before


def test_the_worker_starts_without_heavy_imports() -> None:
    code = (
        "import sys, tilewright.tuner.evaluation.cpu.worker; print({'numpy', 'torch', 'sqlalchemy'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "set()"


def test_weights_larger_than_memory_are_refused_before_they_are_made() -> None:
    signature = MoeGemmSignature(stage="plain", experts=1 << 12, n=1 << 16, k=1 << 16)
    with pytest.raises(TilewrightError, match=r"too large for this machine: .* take 140737.5 GB of .* at most 60%"):
        CpuEvaluator(MoeGemm(), signature, threads=1)


def test_inputs_larger_than_memory_are_refused_before_they_are_drawn() -> None:
    op = Attention()
    signature = AttentionSignature(stage="decode", heads=16, kv_heads=4, head_dim=64)
    with CpuEvaluator(op, signature, threads=1) as evaluator:
        large = op.problem(signature, 1 << 20, RoutingSpec.parse("balanced"))
        with pytest.raises(TilewrightError, match=r"1048576 tokens take 8796.1 GB of .* at most 60% may be used"):
            evaluator.evaluate([], large, budget_s=1.0)


def test_a_problem_larger_than_memory_is_refused(
    subject: CpuEvaluator, make: KernelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "_memory_bytes", 1 << 20)
    with pytest.raises(TilewrightError, match="8192 tokens take"):
        subject.evaluate([make()], problem(8192), budget_s=0.1)
    monkeypatch.undo()
    (evaluation,) = subject.evaluate([make()], problem(), budget_s=0.0)
    assert evaluation.outcome is Outcome.OK
