"""Worker processes: whatever a child does, its parent gets an answer or a sentence, in time, and nothing is left."""

import gc
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tilewright.codegen.workers import process
from tilewright.codegen.workers.process import WorkerHungError, WorkerLostError, WorkerProcess

START_LIMIT_S = 60.0
Start = Callable[[str], WorkerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[WorkerProcess] = []

    def worker(what: str) -> WorkerProcess:
        started.append(WorkerProcess("worker_jobs", [what], start_limit_s=START_LIMIT_S))
        return started[-1]

    yield worker
    for each in started:
        each.close()


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_messages_and_descriptors_go_to_the_child_and_answers_come_back(start: Start, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("from a file")
    worker = start("echo")
    message = {"numbers": [1, 2.5, -3], "text": "ü", "none": None}
    assert worker.ask(message, limit_s=20) == {"said": message, "read": []}
    with (tmp_path / "text").open() as file:
        assert worker.ask({}, limit_s=20, descriptors=[file.fileno()]) == {"said": {}, "read": ["from a file"]}
    long = {"text": "x" * (5 << 20)}
    assert worker.ask(long, limit_s=20)["said"] == long
    assert worker.is_running


def test_a_child_is_confined(start: Start) -> None:
    worker = start("facts")
    facts = worker.ask({}, limit_s=20)
    assert facts["group"] == facts["session"] == worker.pid
    assert facts["limits"] == {"core": 0, "file": 1 << 16, "death": signal.SIGKILL}
    assert facts["stdin"] == ""


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("die", "killed by SIGSEGV: \N{REPLACEMENT CHARACTER}.31mlast words"),
        ("exit", "ended the process with status 3"),
        ("break off", "broke its connection to the tuner"),
        ("too long", "broke its connection to the tuner"),
        ("too deep", "broke its connection to the tuner"),
        ("no object", "broke its connection to the tuner"),
        ("no JSON", "broke its connection to the tuner"),
        ("print for ever", "ended the process with status 1: x{300}"),
    ],
)
def test_how_a_child_ended_is_said_in_a_few_words(start: Start, what: str, how: str) -> None:
    worker = start(what)
    with pytest.raises(WorkerLostError, match=f"^({how})$") as lost:
        worker.ask({}, limit_s=20)
    assert not isinstance(lost.value, WorkerHungError)
    assert not is_running(worker.pid)
    assert not worker.is_running


def test_a_child_that_does_not_become_ready_is_lost(start: Start) -> None:
    with pytest.raises(WorkerLostError, match=r"^ended the process with status 4: no such luck$"):
        start("never ready").wait_until_ready()


def test_a_child_that_does_not_answer_in_time_is_killed(start: Start) -> None:
    worker = start("hang")
    worker.wait_until_ready()
    begin = time.monotonic()
    with pytest.raises(WorkerHungError, match=r"^no result after 0.3 s$"):
        worker.ask({}, limit_s=0.3)
    assert 0.3 <= time.monotonic() - begin < 20
    assert not is_running(worker.pid)


def test_a_message_that_never_ends_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_MESSAGE_LIMIT_S", 0.5)
    worker = start("drip")
    with pytest.raises(WorkerLostError, match="broke its connection"):
        worker.ask({}, limit_s=20)
    assert not is_running(worker.pid)


@pytest.mark.parametrize("hangs", [False, True])
def test_time_counts_anew_with_every_step_that_a_child_makes(start: Start, tmp_path: Path, hangs: bool) -> None:
    watched = tmp_path / "steps"
    watched.write_bytes(bytes(8))
    with watched.open("r+b") as file:
        counter = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")
    worker = start("steps")
    worker.wait_until_ready()
    begin = time.monotonic()
    message = {"watched": str(watched), "steps": 4, "step_s": 1.0, "hangs": hangs}
    if hangs:
        with pytest.raises(WorkerHungError):
            worker.ask(message, limit_s=2.0, progress=lambda: counter[0])
    else:
        assert worker.ask(message, limit_s=2.0, progress=lambda: counter[0]) == {}
    assert time.monotonic() - begin > 3.9


def test_descriptors_that_a_child_sends_are_not_taken(start: Start) -> None:
    worker = start("descriptor")
    worker.wait_until_ready()
    before = open_files()
    assert worker.ask({}, limit_s=20) == {}
    assert open_files() == before


def test_what_a_child_started_ends_with_it(start: Start) -> None:
    worker = start("child")
    grandchild = worker.ask({}, limit_s=20)["pid"]
    assert is_running(grandchild)
    os.kill(worker.pid, signal.SIGKILL)
    wait_for_end(worker.pid)
    assert not worker.is_running
    worker.close()
    wait_for_end(grandchild)


def test_a_forgotten_worker_is_ended_and_frees_what_it_had() -> None:
    gc.collect()  # of other tests
    before = open_files()
    worker = WorkerProcess("worker_jobs", ["echo"], start_limit_s=START_LIMIT_S)
    worker.wait_until_ready()
    pid = worker.pid
    del worker
    gc.collect()
    assert not is_running(pid)
    assert open_files() <= before


_FORKS = """
import os
from tilewright.codegen.workers.process import WorkerProcess
worker = WorkerProcess("worker_jobs", ["echo"], start_limit_s=60)
worker.wait_until_ready()
if os.fork() == 0:
    raise SystemExit
os.wait()
print(worker.ask({}, limit_s=20)["said"], worker.pid)
"""


def test_a_fork_of_the_parent_does_not_end_its_workers() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    said = subprocess.check_output([sys.executable, "-c", _FORKS], text=True, env=environment)
    answer, pid = said.rsplit(maxsplit=1)
    assert answer == "{}"
    assert not is_running(int(pid))  # it did end with the parent
