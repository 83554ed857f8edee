"""Faults injected into a SQLite database: processes killed, disks full, bytes changed, permissions missing."""

import os
import random
import resource
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from tuning_children import CHILDREN, finish, start
from tuning_db_samples import DEVICE, Filled, artifact, failed_trial, fill, kernel, trial

from tilewright.errors import TilewrightError
from tilewright.tuning_db.integrity import DamagedDatabase
from tilewright.tuning_db.locations import user_database
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.records import Outcome
from tilewright.tuning_db.schema import SCHEMA_VERSION
from tilewright.tuning_db.store import Store

SIGNATURE = ("moe_gemm", "signature-1")
UNPRIVILEGED = 65534


def integrity(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tuning.db"


@pytest.fixture
def filled(path: Path) -> Filled:
    with Store.open(path) as store:
        return fill(store)


# Several processes at once


def write(path: Path, writer: int, count: int, results: Connection) -> None:
    with Store.open(path) as store:
        store.put_device(DEVICE)
        run = store.start_run("tune", versions={}, host="here")
        ids = []
        for n in range(count):
            ids.append(store.add_trial(trial(run.id, seed=writer * 10_000 + n)))
            if n % 10 == 0:
                built = artifact(os.urandom(20_000))
                store.add_kernel(kernel(built, key=f"{writer}-{n}"), [built])
        results.send(ids)


def read_kernels(path: Path, done: Event, results: Connection) -> None:
    """What the runtime does: no error, and every kernel it sees is whole."""
    reader, seen = Reader.open(path), 0
    while not done.is_set():
        with Store.open_read_only(path) as store:
            keys = [each.key for each in store.kernels()]
        for key in keys[seen:]:
            (checksum,) = reader.kernel(key).artifacts
            reader.artifact(checksum)
        seen = len(keys)
    results.send(seen)


def read_trials(path: Path, done: Event, results: Connection) -> None:
    """What `tune show` does: no error, and nothing that was seen is gone again."""
    seen = 0
    with Store.open_read_only(path) as store:
        while not done.is_set():
            found = store.counts().trials
            assert found >= seen
            seen = found
            assert sum(each.trials for each in store.summary()) >= seen
    results.send(seen)


def test_two_writers_and_three_readers(path: Path) -> None:
    Store.open(path).close()
    done = CHILDREN.Event()
    readers = [start(target, path, done) for target in (read_kernels, read_kernels, read_trials)]
    writers = [start(write, path, writer, 100) for writer in (1, 2)]
    stored = {
        number: writer * 10_000 + n
        for writer, child in zip((1, 2), writers, strict=True)
        for n, number in enumerate(finish(*child))
    }
    done.set()
    for reader in readers:
        finish(*reader)
    with Store.open(path) as store:
        assert {each.id: each.seed for each in store.trials()} == stored
        assert len(stored) == 200
        assert len(store.kernels()) == 20
        assert store.check() == []


def test_several_processes_may_make_the_database(path: Path) -> None:
    stored = [number for child in [start(write, path, writer, 1) for writer in range(4)] for number in finish(*child)]
    with Store.open(path) as store:
        assert sorted(stored) == [each.id for each in store.trials()]
        assert len(stored) == 4


def test_a_lock_that_is_held_is_waited_for(path: Path, filled: Filled) -> None:
    with Store.open(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        process, results = start(write, path, 1, 1)
        assert not results.poll(1.0)
        assert len(store.trials()) == len(filled.trials)
        other.execute("COMMIT")
        finish(process, results)
        assert len(store.trials()) == len(filled.trials) + 1


def test_a_lock_that_is_never_released_is_an_error(path: Path, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.tuning_db.connection.BUSY_SECONDS", 0.3)
    with Store.open(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TilewrightError, match=r"stayed locked .* run again"):
            store.add_trial(trial(filled.run.id))


# Killed


def write_until_killed(path: Path, acknowledged: Connection) -> None:
    with Store.open(path) as store:
        store.put_device(DEVICE)
        run = store.start_run("tune", versions={}, host="here")
        while True:
            built = artifact(os.urandom(50_000))
            key = store.add_trial(trial(run.id, message="x" * 5000)), built.checksum
            store.add_kernel(kernel(built, key=built.checksum), [built])
            acknowledged.send(key)


@pytest.mark.parametrize("moment", ["making the database", "writing"])
def test_kill_9_loses_nothing_that_was_acknowledged(path: Path, moment: str) -> None:
    moments = random.Random(moment)
    acknowledged: list[tuple[int, str]] = []
    for round_ in range(10):
        if moment == "making the database":
            path, acknowledged = path.with_name(f"{round_}.db"), []
        process, results = start(write_until_killed, path)
        if moment == "writing":
            acknowledged.append(results.recv())
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        try:
            while True:
                acknowledged.append(results.recv())
        except EOFError:
            pass
        with Store.open(path) as store:
            assert {number for number, _ in acknowledged} <= {each.id for each in store.trials()}
            assert {name for _, name in acknowledged} <= {each.key for each in store.kernels()}
            assert store.check() == []
        assert integrity(path) == "ok"


# Full


def test_a_full_disk_is_one_clear_error_and_loses_nothing(path: Path, filled: Filled) -> None:
    with Store.open(path) as store:
        with store._database.engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
        large = artifact(os.urandom(100_000))
        with pytest.raises(TilewrightError, match=r"the disk is full; free some space"):
            store.add_kernel(kernel(large, key="large"), [large])
        with pytest.raises(TilewrightError, match=r"the disk is full; free some space"):
            store.add_trials(trial(filled.run.id, message="x" * 1000) for _ in range(100))
        assert store.trials() == list(filled.trials)
        assert store.kernels() == [filled.kernel]
        assert store.check() == []

        with store._database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        store.add_kernel(kernel(large, key="large"), [large])
        assert store.counts().kernels == 2


def write_within_a_limit(path: Path, run_id: str, limit_bytes: int, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    acknowledged: list[int] = []
    try:
        with Store.open(path) as store:
            while True:
                acknowledged.append(store.add_trial(trial(run_id, message="x" * 10_000)))
    except TilewrightError as error:
        results.send((acknowledged, str(error)))


def test_a_file_that_may_not_grow_is_one_clear_error_and_loses_nothing(path: Path, filled: Filled) -> None:
    acknowledged, message = finish(*start(write_within_a_limit, path, filled.run.id, 400_000))
    assert "check the disk's free space, quota" in message
    assert str(path) in message
    with Store.open(path) as store:
        assert [each.id for each in store.trials()] == [each.id for each in filled.trials] + acknowledged
        assert len(acknowledged) > 3
        assert store.check() == []


# Not allowed


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that an unprivileged user can reach, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


def attempt_unprivileged(action: Callable[..., Any], arguments: tuple[Any, ...], results: Connection) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(UNPRIVILEGED)
        os.setuid(UNPRIVILEGED)
    try:
        results.send(action(*arguments))
    except TilewrightError as error:
        results.send(f"TilewrightError: {error}")


def unprivileged(action: Callable[..., Any], *arguments: Any) -> Any:
    """Do it in a process that is not root, since nothing is forbidden to root."""
    return finish(*start(attempt_unprivileged, action, arguments))


def add_one_trial(path: Path, run_id: str) -> int:
    with Store.open(path) as store:
        return store.add_trial(trial(run_id))


def read_the_plan(path: Path) -> object:
    (plan,) = Reader.open(path).plans_for(*SIGNATURE)
    return plan


def show_the_trials(path: Path) -> int:
    with Store.open_read_only(path) as store:
        return len(store.trials())


@pytest.mark.parametrize("directory_mode", [0o755, 0o555])
def test_a_read_only_database_is_read_but_not_written(shared_directory: Path, directory_mode: int) -> None:
    path = shared_directory / "tuning.db"
    with Store.open(path) as store:
        filled = fill(store)
    path.chmod(0o444)
    shared_directory.chmod(directory_mode)

    assert "cannot be written; make the file and its directory writable" in unprivileged(
        add_one_trial, path, filled.run.id
    )
    assert unprivileged(read_the_plan, path) == filled.plan
    assert unprivileged(show_the_trials, path) == len(filled.trials)
    assert sorted(each.name for each in shared_directory.iterdir()) == ["tuning.db"]
    assert integrity(path) == "ok"


def test_a_database_that_is_being_written_is_read_by_another_user(shared_directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    path = shared_directory / "tuning.db"
    with Store.open(path) as store:
        filled = fill(store)
        newer = replace(filled.plan, layout="rows")
        store.put_plan(newer)
        assert unprivileged(read_the_plan, path) == newer
        assert unprivileged(show_the_trials, path) == len(filled.trials)


def test_a_database_in_a_directory_that_cannot_be_written_is_not_made(shared_directory: Path) -> None:
    path = shared_directory / "tuning.db"
    shared_directory.chmod(0o555)
    assert "cannot be made: this user may not do that" in unprivileged(add_one_trial, path, "run")
    assert not path.exists()


def test_a_directory_that_cannot_be_entered(shared_directory: Path) -> None:
    closed = shared_directory / "closed"
    closed.mkdir(mode=0o000)
    for action in (show_the_trials, read_the_plan):
        assert "Permission denied; check its permissions" in unprivileged(action, closed / "tuning.db")


# Nowhere, or something else


def test_the_default_location_is_made_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILEWRIGHT_DB", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with pytest.raises(TilewrightError, match="there is no database"):
        Store.open_read_only()
    with Store.open() as store:
        filled = fill(store)
        assert store.path == user_database()
        assert store.path.is_relative_to(tmp_path)
    assert stat.S_IMODE(user_database().parent.stat().st_mode) == 0o700
    assert Reader.open().plans_for(*SIGNATURE) == (filled.plan,)


def test_a_named_database_is_made_only_where_its_directory_exists(tmp_path: Path) -> None:
    with pytest.raises(TilewrightError, match="cannot be made: No such file or directory"):
        Store.open(tmp_path / "typo" / "tuning.db")
    assert list(tmp_path.iterdir()) == []
    for opening in (lambda path: Store.open(path, create=False), Store.open_read_only):
        with pytest.raises(TilewrightError, match="there is no database"):
            opening(tmp_path / "tuning.db")
        with pytest.raises(TilewrightError, match="is not a file"):
            opening(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://user:secret@host/db", "unsupported kind"),
        ("://", "neither a path nor a database URL"),
        ("postgresql+nothing://host/db", "unknown driver"),
    ],
)
def test_a_url_of_nothing_we_know(url: str, message: str) -> None:
    for opening in (Store.open, Store.open_read_only):
        with pytest.raises(TilewrightError, match=message) as failure:
            opening(url)
        assert "secret" not in str(failure.value)


@pytest.mark.parametrize("content", [b"a text", b"a text that is longer than a header " * 100, b"\0" * 8192])
def test_a_file_that_is_no_database_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    for opening in (Store.open, Store.open_read_only, Reader.open):
        with pytest.raises(DamagedDatabase, match="is not a database"):
            opening(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE studies (id INTEGER)")
    before = path.read_bytes()
    for opening in (Store.open, Store.open_read_only):
        with pytest.raises(TilewrightError, match=r"database of another program; name another file"):
            opening(path)
    assert path.read_bytes() == before
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name]


def test_a_newer_schema_is_left_alone(path: Path, filled: Filled) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(TilewrightError, match="newer tilewright"):
        add_one_trial(path, filled.run.id)
    assert path.read_bytes() == before


# Damaged


def examine(path: Path, filled: Filled) -> bool:
    """Read all there is. Nothing but TilewrightError may come out, and what the runtime executes is never changed."""
    whole = True
    try:
        reader = Reader.open(path)
        found = reader.plans_for(*SIGNATURE)
        assert found in ((filled.plan,), ())
        whole &= bool(found)
    except TilewrightError:
        whole = False
    try:
        assert Reader.open(path).kernel(filled.kernel.key).recipe == filled.kernel.recipe
        for each in filled.artifacts:
            assert Reader.open(path).artifact(each.checksum) == each.data
    except TilewrightError:
        whole = False
    try:
        with Store.open(path, create=False) as store:
            whole &= not store.check()
            whole &= store.counts().trials == len(store.trials())
            store.summary()
    except TilewrightError:
        whole = False
    return whole


@pytest.mark.parametrize("part", [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_database_is_one_clear_error(path: Path, filled: Filled, part: float) -> None:
    content = path.read_bytes()
    kept = content[: int(len(content) * part)]
    path.write_bytes(kept)
    for opening in (Store.open, Store.open_read_only, Reader.open):
        with pytest.raises(DamagedDatabase, match=str(path)):
            opening(path)
    assert path.read_bytes() == kept
    assert not examine(path, filled)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_never_change_what_is_executed(path: Path, filled: Filled, seed: int) -> None:
    content = path.read_bytes()
    choose = random.Random(seed)
    # Zeros are mostly free space, where a flip changes nothing.
    used = [position for position, byte in enumerate(content) if byte]
    noticed = 0
    for _ in range(30):
        damaged = bytearray(content)
        damaged[choose.choice(used)] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        noticed += not examine(path, filled)
        for beside in path.parent.glob("tuning.db-*"):
            beside.unlink()
    assert noticed > 10


def test_a_damaged_page_is_found_by_an_examination(path: Path, filled: Filled) -> None:
    with Store.open(path) as store:
        store.add_trials(failed_trial(filled.run.id, Outcome.CRASHED) for _ in range(200))
    content = bytearray(path.read_bytes())
    middle = content.rindex(b"segmentation fault")
    page = middle - middle % 4096
    content[page : page + 100] = b"\xff" * 100
    path.write_bytes(content)
    with Store.open(path) as store:
        with pytest.raises(DamagedDatabase, match=r"is damaged .*restore it from a copy"):
            store.trials()
        assert any("damaged" in sentence for sentence in store.check())
    assert Reader.open(path).plans_for(*SIGNATURE) == (filled.plan,)
