"""kill -9 of tuners and their workers at random moments, and two tuners and three readers on one database."""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from covering import FULL
from evaluation_kernels import needs_compiler
from patience import PATIENCE_S, wait_until
from tuning_children import (
    CHILDREN,
    FIELDS,
    SIZES,
    finish,
    kill_9,
    read,
    serve,
    served_result,
    start,
    tune,
    workers_of,
)

from tilewright.tuner.campaign.loop import BATCH, FINAL_RACE
from tilewright.tuner.cli import main
from tilewright.tuning_db.records import Outcome, TrialRecord
from tilewright.tuning_db.store import Store

pytestmark = needs_compiler


@pytest.fixture
def database(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    path = tmp_path / "tuning.db"
    Store.open(path).close()
    return path


def sound_trials(database: Path) -> list[TrialRecord]:
    with Store.open_read_only(database) as store:
        assert store.check() == []
        return store.trials()


def tried(trials: list[TrialRecord]) -> Counter[tuple[str, str]]:
    """How often each config was tried on each problem, last races apart: those measure finalists again."""
    return Counter((t.problem_key, str(sorted(t.config.items()))) for t in trials if t.search != FINAL_RACE)


def searched_of_problem(trials: list[TrialRecord]) -> Counter[str]:
    return Counter(t.problem_key for t in trials if t.search != FINAL_RACE)


ROUNDS = 20 if FULL else 5


def test_kill_9_again_and_again_then_resume(database: Path) -> None:
    assert finish(*start(tune, database, 2, 2.0, 0)) == ("plans", 1)
    begin = time.monotonic()
    assert finish(*start(tune, database, 4, 2.0, 0)) == ("plans", 1)
    whole_s = min(time.monotonic() - begin, 6.0)  # a busy machine takes longer, and would over all rounds
    before = sound_trials(database)
    moments = random.Random(20)
    cut_short = rounds_with_trials = 0
    for round_ in range(1, ROUNDS + 1):
        known = dict(searched_of_problem(before))
        tuner, results = start(tune, database, 4 + 2 * round_, 2.0, round_)
        if round_ % 3 == 0:  # at any moment, but on a busy machine most of those lie before the first trial is stored
            assert results.poll(PATIENCE_S)
            time.sleep(moments.uniform(0, whole_s / 4))
        else:
            time.sleep(moments.uniform(0, whole_s))
        workers = workers_of(tuner.pid or 0)
        cut_short += tuner.is_alive()
        kill_9(tuner.pid or 0)
        tuner.join()
        known.update({key: trials for key, trials in said(results) if key != "plans"})
        after = sound_trials(database)
        assert [t.id for t in after[: len(before)]] == [t.id for t in before]
        for key, trials in searched_of_problem(after).items():
            assert known[key] <= trials <= known[key] + BATCH
        assert max(tried(after).values()) == 1
        wait_until(lambda pids=workers: not any(map(is_alive, pids)), "a worker outlived its tuner")
        rounds_with_trials += len(after) > len(before)
        before = after
    assert cut_short >= ROUNDS // 2
    assert rounds_with_trials >= max(1, ROUNDS // 6)

    words = ["--arch", "native", "--op", "moe_gemm", "--problem", FIELDS, "--tokens", ",".join(map(str, SIZES))]
    assert main([*words, "--threads", "1", "--db", str(database), "--resume", "--trials", "50", "--time", "4"]) == 0
    after = sound_trials(database)
    assert [t.id for t in after[: len(before)]] == [t.id for t in before]
    assert max(tried(after).values()) == 1
    assert "cpu_" in served_result(database)


def said(results: Connection) -> Iterator[tuple[str, int]]:
    """What a process said before its end."""
    with contextlib.suppress(EOFError):
        while True:
            yield results.recv()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_run_goes_on_when_its_workers_are_killed(database: Path) -> None:
    moments = random.Random(5)
    tuner, results = start(tune, database, 30, 60.0, 0)  # what a busy machine needs once nothing is killed
    killed = set()
    while tuner.is_alive() and len(killed) < 20:
        # Seldom enough for a worker to get something done, often enough to meet it in whatever it does.
        time.sleep(moments.uniform(0.1, 1.0))
        for worker in workers_of(tuner.pid or 0):
            kill_9(worker)
            killed.add(worker)
    assert finish(tuner, results) == ("plans", 1)
    assert len(killed) >= 5
    outcomes = Counter(t.outcome for t in sound_trials(database))
    assert outcomes[Outcome.OK] > outcomes.total() / 2
    assert set(outcomes) <= {Outcome.OK, Outcome.CRASHED}
    assert "cpu_" in served_result(database)


def test_two_tuners_and_three_readers(database: Path) -> None:
    done = CHILDREN.Event()
    tuners = [start(tune, database, 24, 10.0, seed) for seed in (1, 2)]
    with Store.open_read_only(database) as store:
        wait_until(lambda: store.counts().trials > 0, "no tuner stored a trial")
    readers = [
        start(read, ["show", "--db", str(database)], done),
        start(read, ["compare", "--db", str(database)], done),
        start(serve, database, done),
    ]
    assert [finish(*tuner) for tuner in tuners] == [("plans", 1), ("plans", 1)]
    served = served_result(database)
    time.sleep(1)  # readers see the last state, too
    done.set()
    (shown, show), (compared, compare), (called, serving) = (finish(*reader) for reader in readers)
    assert min(shown, compared, called) >= 1
    assert "plan of" in show
    assert "time/best" in compare
    assert "cpu_" in served
    assert "cpu_" in serving
    trials = sound_trials(database)
    with Store.open_read_only(database) as store:
        assert len(store.runs()) == 2
        assert len(store.plans()) == 1
    assert Counter(t.seed for t in trials if t.search != FINAL_RACE).keys() == {1, 2}
    assert all(t.outcome is Outcome.OK for t in trials)
