"""What every kind of database does alike. A new kind inherits ``StoreContract`` and says where its database is."""

import itertools
import math
import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from sqlalchemy import create_engine, text
from tuning_db_samples import DEVICE, artifact, failed_trial, fill, kernel, plan, trial

from tilewright.errors import TilewrightError
from tilewright.tuning_db.models import Base
from tilewright.tuning_db.records import CHECKED_LEVELS, DeviceRecord, Outcome, PlanEntry
from tilewright.tuning_db.store import Store

POSTGRESQL_URL = os.environ.get("TILEWRIGHT_TEST_POSTGRESQL", "")


class StoreContract:
    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        with Store.open(url) as store:
            yield store

    @pytest.fixture
    def run_id(self, store: Store) -> str:
        store.put_device(DEVICE)
        return store.start_run("tune", versions={}, host="here").id

    def test_everything_comes_back_after_reopening(self, url: str) -> None:
        with Store.open(url) as store:
            filled = fill(store)
        with Store.open(url) as store:
            assert store.trials() == list(filled.trials)
            assert store.kernels() == [filled.kernel]
            assert store.kernel(filled.kernel.key) == filled.kernel
            assert [store.artifact(each.checksum) for each in filled.artifacts] == list(filled.artifacts)
            assert store.plans() == [filled.plan]
            assert store.devices() == [DEVICE]
            (run,) = store.runs()
            assert run == replace(filled.run, finished_at=run.finished_at)
            assert run.finished_at is not None
            assert run.finished_at >= run.started_at
            assert store.check() == []

    def test_opening_for_reading_shows_the_same_and_refuses_to_write(self, url: str) -> None:
        with Store.open(url) as store:
            filled = fill(store)
        with Store.open_read_only(url) as store:
            assert store.trials() == list(filled.trials)
            with pytest.raises(TilewrightError):
                store.add_trial(trial(filled.run.id))
            assert len(store.trials()) == len(filled.trials)

    def test_what_is_not_there_is_none(self, store: Store) -> None:
        assert store.kernel("nothing") is None
        assert store.artifact("nothing") is None
        assert store.plans(op="attention") == []
        assert store.summary() == []
        assert store.add_trials([]) == []

    def test_ids_follow_the_order_of_trials(self, store: Store, run_id: str) -> None:
        configs = [{"block_m": n} for n in range(500)]
        ids = store.add_trials(trial(run_id, config=config) for config in configs)
        assert ids == sorted(set(ids))
        assert [each.config for each in store.trials()] == configs
        assert [each.id for each in store.trials(limit=3)] == ids[:3]

    def test_trials_are_added_all_or_none(self, store: Store, run_id: str) -> None:
        with pytest.raises(ValueError, match="must be stored first"):
            store.add_trials([trial(run_id), trial(run_id, device_key="unknown")])
        with pytest.raises(ValueError, match="must be stored first"):
            store.add_trial(trial("unknown"))
        assert store.trials() == []

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("op", "gating"),
            ("signature_key", "signature-2"),
            ("problem_key", "problem-32"),
            ("device_key", "cpu-2"),
            ("threads", 1),
            ("template", "cpu_stream"),
            ("kernel_key", "c" * 64),
            ("outcome", Outcome.WRONG),
        ],
    )
    def test_a_filter_selects_by_its_column(self, store: Store, run_id: str, name: str, value: object) -> None:
        store.put_device(replace(DEVICE, key="cpu-2"))
        plain, changed = store.add_trials([trial(run_id), trial(run_id, **{name: value})])
        assert [each.id for each in store.trials(**{name: value})] == [changed]
        assert [each.id for each in store.trials(**{name: None})] == [plain, changed]
        assert [each.trials for each in store.summary(**{name: value})] == [1]

    def test_neighbours_are_ranked_within_their_own_problem(self, store: Store, run_id: str) -> None:
        for problem_key, times in {"problem-1": (9.0, 3.0, 6.0), "problem-2": (900.0, 300.0), "mine": (1.0,)}.items():
            store.add_trials(trial(run_id, problem_key=problem_key, median_us=time) for time in times)
        store.add_trial(trial(run_id, problem_key="problem-3", template="cpu_stream"))
        found = store.neighbours(other_than="mine", op="moe_gemm", template="cpu_blocked", per_problem=2)
        assert [(each.problem_key, each.median_us) for each in found] == [
            ("problem-1", 3.0),
            ("problem-1", 6.0),
            ("problem-2", 300.0),
            ("problem-2", 900.0),
        ]

    def test_a_summary_counts_outcomes_and_keeps_evidence_apart(self, store: Store, run_id: str) -> None:
        store.add_trials(
            [
                trial(run_id, median_us=20.0, created_at=2.0),
                trial(run_id, median_us=15.0, created_at=1.0),
                trial(run_id, median_us=3.0, timing="predicted"),
                trial(run_id, median_us=1.0, outcome=Outcome.WRONG),
                failed_trial(run_id, Outcome.TIMED_OUT, created_at=3e9),
                trial(run_id, threads=1),
            ]
        )
        one_thread, two_threads = store.summary()
        assert (one_thread.threads, one_thread.trials) == (1, 1)
        assert two_threads.outcomes == {Outcome.OK: 3, Outcome.WRONG: 1, Outcome.TIMED_OUT: 1}
        assert (two_threads.best_measured_us, two_threads.best_predicted_us) == (15.0, 3.0)
        assert two_threads.last_at == 3e9
        assert two_threads.problem == trial(run_id).problem

    def test_counts(self, store: Store) -> None:
        filled = fill(store)
        counts = store.counts()
        assert (counts.runs, counts.devices, counts.kernels, counts.plans) == (1, 1, 1, 1)
        assert (counts.trials, counts.artifacts) == (len(filled.trials), len(filled.artifacts))
        assert counts.artifact_bytes == sum(len(each.data) for each in filled.artifacts)

    def test_a_result_that_is_not_a_number_stays_known_as_wrong(self, store: Store, run_id: str) -> None:
        store.add_trial(trial(run_id, outcome=Outcome.WRONG, error=math.nan))
        assert store.trials()[0].error == math.inf

    def test_any_compiler_output_can_be_kept(self, store: Store, run_id: str) -> None:
        output = b"error: \xff\x00 \xc3\xa9".decode(errors="surrogateescape")
        store.add_trial(trial(run_id, message=output))
        assert store.trials()[0].message == "error: ?? é"

    def test_adding_a_kernel_again_keeps_its_age_and_never_lowers_what_was_checked(self, store: Store) -> None:
        first = kernel(artifact(), checked="emulated")
        store.add_kernel(first, [artifact()])
        store.add_kernel(replace(first, checked="compiled", created_at=2e9), [artifact()])
        assert store.kernels() == [first]
        store.add_kernel(replace(first, checked="device"), [artifact()])
        assert store.kernels() == [replace(first, checked="device")]
        assert store.counts().artifacts == 1

    def test_one_artifact_can_serve_several_launches_and_kernels(self, store: Store) -> None:
        twice = kernel(artifact(), artifact(b"other"), artifact())
        store.add_kernel(twice, [artifact(), artifact(b"other")])
        store.add_kernel(replace(kernel(artifact()), key="c" * 64), [artifact()])
        assert store.kernel(twice.key) == twice
        assert store.counts().artifacts == 2

    def test_a_kernel_needs_exactly_its_artifacts(self, store: Store) -> None:
        with pytest.raises(ValueError, match="other artifacts"):
            store.add_kernel(kernel(artifact()), [])
        with pytest.raises(ValueError, match="checksum"):
            store.add_kernel(kernel(artifact()), [replace(artifact(), data=b"changed")])
        assert store.counts().kernels == store.counts().artifacts == 0

    def test_kernels_are_selected_by_their_columns(self, store: Store) -> None:
        first, second = kernel(), kernel(key="c" * 64, arch="sm_90", op="gating")
        store.add_kernel(first, [])
        store.add_kernel(second, [])
        assert store.kernels(op="gating", arch="sm_90") == [second]
        assert store.kernels(op="gating", arch="x86_64") == []

    def test_a_new_plan_takes_the_place_of_the_old_one(self, store: Store) -> None:
        filled = fill(store)
        longer = replace(filled.plan, entries=(PlanEntry(1, None), *filled.plan.entries), layout="rows", model="")
        store.put_plan(longer)
        assert store.plans() == [longer]
        one_thread = replace(filled.plan, threads=1)
        store.put_plan(one_thread)
        assert store.plans(op="moe_gemm") == [one_thread, longer]
        assert store.plans(threads=2) == [longer]

    def test_plans_of_another_precision_or_promise_stand_beside_it(self, store: Store) -> None:
        filled = fill(store)
        lossy = replace(filled.plan, precision="int8", error=0.01)
        invariant = replace(filled.plan, batch_invariant=True)
        for each in (lossy, invariant):
            store.put_plan(each)
        assert store.plans() == [filled.plan, invariant, lossy]
        slower = replace(invariant, layout="rows")
        store.put_plan(slower)
        assert store.plans() == [filled.plan, slower, lossy]

    def test_a_predicted_plan_stands_beside_a_measured_one(self, store: Store) -> None:
        filled = fill(store)
        predicted = replace(filled.plan, timing="predicted", checked="compiled", error=0.5)
        assert store.put_plan(predicted)
        assert store.plans() == [filled.plan, predicted]
        newer = replace(predicted, error=0.0)
        assert store.put_plan(newer)
        assert store.plans() == [filled.plan, newer]
        assert store.put_plan(replace(filled.plan, layout="rows"))
        assert [(each.timing, each.layout) for each in store.plans()] == [
            ("measured", "rows"),
            ("predicted", "panels-8"),
        ]

    def test_a_plan_replaces_one_that_was_checked_as_far_or_less(self, store: Store) -> None:
        filled = fill(store)
        for threads, (stored, given) in enumerate(itertools.product(CHECKED_LEVELS, repeat=2), start=10):
            old = replace(filled.plan, threads=threads, timing="predicted", checked=stored)
            new = replace(old, checked=given, layout="rows", entries=(PlanEntry(None, filled.kernel.key),))
            assert store.put_plan(old)
            replaces = CHECKED_LEVELS.index(given) >= CHECKED_LEVELS.index(stored)
            assert store.put_plan(new) == replaces, (stored, given)
            assert store.plans(threads=threads) == [new if replaces else old]

    def test_a_plan_that_cannot_be_stored_leaves_the_old_one(self, store: Store) -> None:
        filled = fill(store)
        with pytest.raises(ValueError, match="must be stored first"):
            store.put_plan(plan("unknown kernel"))
        assert store.plans() == [filled.plan]

    def test_a_device_is_replaced(self, store: Store) -> None:
        store.put_device(DEVICE)
        newer = DeviceRecord(DEVICE.key, "Another name", "x86_64", {})
        store.put_device(newer)
        assert store.devices() == [newer]

    def test_threads_share_a_store(self, store: Store, run_id: str) -> None:
        with ThreadPoolExecutor(4) as pool:
            ids = list(pool.map(lambda n: store.add_trial(trial(run_id, seed=n)), range(40)))
        assert {each.id: each.seed for each in store.trials()} == {number: seed for seed, number in enumerate(ids)}

    def test_a_newer_schema_is_refused_and_left_alone(self, url: str) -> None:
        with Store.open(url) as store:
            fill(store)
        self.make_newer(url)
        for opening in (Store.open, Store.open_read_only):
            with pytest.raises(TilewrightError, match=r"newer tilewright.*upgrade tilewright"):
                opening(url)

    def make_newer(self, url: str) -> None:
        raise NotImplementedError


class TestSqliteStore(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{quote(str(tmp_path / 'spaces, % and ?#.db'))}"

    def make_newer(self, url: str) -> None:
        with closing(sqlite3.connect(unquote(url.removeprefix("sqlite:///")))) as connection:
            connection.execute("PRAGMA user_version = 9999")


@pytest.mark.skipif(not POSTGRESQL_URL, reason="$TILEWRIGHT_TEST_POSTGRESQL names no PostgreSQL database to test on")
class TestPostgresqlStore(StoreContract):
    @pytest.fixture
    def url(self) -> Iterator[str]:
        """The server's database, emptied before and after: name one that holds nothing else."""
        self.drop_tables()
        yield POSTGRESQL_URL
        self.drop_tables()

    def drop_tables(self) -> None:
        engine = create_engine(POSTGRESQL_URL)
        with engine.begin() as connection:
            Base.metadata.drop_all(connection)
            connection.execute(text("DROP TABLE IF EXISTS tilewright_alembic_version"))
        engine.dispose()

    def make_newer(self, url: str) -> None:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE tilewright_alembic_version SET version_num = '9999'"))
        engine.dispose()
