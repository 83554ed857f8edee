import multiprocessing
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tuning_db_samples import Filled, fill, kernel, plan

from tilewright.errors import TilewrightError
from tilewright.tuning_db.integrity import check_private
from tilewright.tuning_db.reader import DamagedArtifact, DamagedDatabase, Reader, UntrustedFile
from tilewright.tuning_db.schema import SCHEMA_VERSION
from tilewright.tuning_db.store import Store

SIGNATURE = ("moe_gemm", "signature-1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tuning #1?.db"


@pytest.fixture
def filled(path: Path) -> Filled:
    with Store.open(path) as store:
        return fill(store)


@pytest.fixture
def writer(path: Path) -> Iterator[Store]:
    with Store.open(path) as store:
        yield store


def change(path: Path, statement: str, *values: object) -> None:
    """Change what is stored behind the store's back."""
    with closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(statement, values).rowcount != 0


def test_it_reads_what_the_store_wrote(path: Path, filled: Filled) -> None:
    reader = Reader.open(path)
    assert reader.plans_for(*SIGNATURE) == (filled.plan,)
    assert reader.kernel(filled.kernel.key) == filled.kernel
    assert [reader.artifact(each.checksum) for each in filled.artifacts] == [each.data for each in filled.artifacts]
    assert Reader.open(f"sqlite:///{str(path).replace('#', '%23').replace('?', '%3F')}").path == path


@pytest.mark.usefixtures("filled")
def test_what_is_not_there(path: Path) -> None:
    reader = Reader.open(path)
    assert reader.plans_for("attention", "signature-1") == ()
    assert reader.plans_for("moe_gemm", "signature-2") == ()
    with pytest.raises(TilewrightError, match="holds no kernel"):
        reader.kernel("c" * 64)
    with pytest.raises(TilewrightError, match="holds no artifact"):
        reader.artifact("c" * 64)


def test_plans_of_other_devices_can_be_listed(path: Path, filled: Filled, writer: Store) -> None:
    one_thread = replace(filled.plan, threads=1)
    writer.put_plan(one_thread)
    assert Reader.open(path).plans_for("moe_gemm", "signature-1") == (one_thread, filled.plan)


def test_measured_plans_come_before_predicted_ones(path: Path, filled: Filled, writer: Store) -> None:
    predicted = replace(filled.plan, timing="predicted", checked="compiled", threads=1)
    writer.put_plan(predicted)
    assert Reader.open(path).plans_for(*SIGNATURE) == (filled.plan, predicted)


def test_the_environment_names_the_default(path: Path, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_DB", str(path))
    assert Reader.open().plans_for(*SIGNATURE) == (filled.plan,)


def test_it_sees_what_an_open_writer_has_committed(path: Path, filled: Filled, writer: Store) -> None:
    reader = Reader.open(path)
    newer = replace(filled.plan, layout="rows")
    writer.put_plan(newer)
    assert path.with_name(path.name + "-wal").stat().st_size > 0
    assert reader.plans_for(*SIGNATURE) == (newer,)


def test_an_open_write_does_not_stop_it(path: Path, filled: Filled) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("DELETE FROM plan_entries")
        assert Reader.open(path).plans_for(*SIGNATURE) == (filled.plan,)


@pytest.mark.usefixtures("filled")
def test_it_never_writes(path: Path) -> None:
    before = path.read_bytes()
    with Reader.open(path)._connected() as connection, pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM plans")
    assert path.read_bytes() == before


def test_threads_share_a_reader(path: Path, filled: Filled) -> None:
    reader = Reader.open(path)
    with ThreadPoolExecutor(4) as pool:
        assert all(each == (filled.plan,) for each in pool.map(lambda _: reader.plans_for(*SIGNATURE), range(40)))


def read_in_child(reader: Reader, results: "multiprocessing.queues.SimpleQueue[object]") -> None:
    results.put(reader.plans_for(*SIGNATURE))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_children_read_while_threads_of_the_parent_do(path: Path, filled: Filled) -> None:
    reader = Reader.open(path)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(reader.plans_for, *SIGNATURE) for _ in range(200)]
        children = [context.Process(target=read_in_child, args=(reader, results)) for _ in range(8)]
        for child in children:
            child.start()
        assert [results.get() for _ in children] == [(filled.plan,)] * len(children)
        for child in children:
            child.join()
        assert all(each.result() == (filled.plan,) for each in reading)


def test_changed_bytes_of_an_artifact_are_refused_and_tuning_again_mends_them(path: Path, filled: Filled) -> None:
    first = filled.artifacts[0]
    for damaged in (b"\0" + first.data[1:], "text", first.data[:-1], b""):
        change(path, "UPDATE artifacts SET data = ? WHERE checksum = ?", damaged, first.checksum)
        with pytest.raises(DamagedArtifact, match=r"artifact .* damaged"):
            Reader.open(path).artifact(first.checksum)
    with Store.open(path) as store:
        assert any("damaged" in sentence for sentence in store.check())
        store.add_kernel(filled.kernel, filled.artifacts)
        assert store.check() == []
    assert Reader.open(path).artifact(first.checksum) == first.data


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE kernels SET recipe = replace(recipe, 'tokens', 'tokenr')",
        "UPDATE kernels SET recipe = 'not json'",
        "UPDATE kernels SET recipe = x'ff'",
        "UPDATE kernels SET signature = '[1]'",
        "UPDATE kernels SET source = CAST(x'ff' AS TEXT)",
        "UPDATE kernel_artifacts SET position = 2 - position",
    ],
)
def test_a_changed_kernel_is_refused(path: Path, filled: Filled, statement: str) -> None:
    change(path, statement)
    with pytest.raises(DamagedDatabase, match=r"damaged .*restore it"):
        Reader.open(path).kernel(filled.kernel.key)
    with Store.open(path) as store:
        assert any("damaged" in sentence for sentence in store.check())


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE plans SET layout = 'rows'",
        "UPDATE plans SET batch_invariant = 1",
        "UPDATE plan_entries SET max_size = 17 WHERE position = 0",
        "UPDATE plan_entries SET median_us = 'fast'",
        "DELETE FROM plan_entries",
        "DROP TABLE plan_entries",
        "ALTER TABLE plan_entries RENAME COLUMN median_us TO median_uz",
    ],
)
@pytest.mark.usefixtures("filled")
def test_a_changed_plan_is_refused(path: Path, statement: str) -> None:
    change(path, statement)
    with pytest.raises(DamagedDatabase, match=r"damaged .*restore it"):
        Reader.open(path).plans_for(*SIGNATURE)


def test_files_it_cannot_read_are_explained(path: Path, tmp_path: Path) -> None:
    with pytest.raises(TilewrightError, match=r"there is no database .*run `tune`"):
        Reader.open(path)
    with pytest.raises(TilewrightError, match="served from SQLite files"):
        Reader.open("postgresql://team/tuning")
    with pytest.raises(TilewrightError, match="is not a file"):
        Reader.open(tmp_path)
    path.touch(0o600)
    with pytest.raises(TilewrightError, match="is empty"):
        Reader.open(path)
    path.write_bytes(b"a text, much longer than a header of SQLite is" * 4)
    with pytest.raises(DamagedDatabase, match="not a database"):
        Reader.open(path)


@pytest.mark.usefixtures("filled")
def test_other_schemas_are_refused(path: Path, tmp_path: Path) -> None:
    reader = Reader.open(path)
    change(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(TilewrightError, match=r"newer tilewright .*upgrade tilewright"):
        reader.plans_for(*SIGNATURE)
    foreign = tmp_path / "foreign.db"
    change(foreign, "CREATE TABLE trials (id INTEGER)")
    foreign.chmod(0o600)
    with pytest.raises(TilewrightError, match="another program"):
        Reader.open(foreign)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(path: Path, filled: Filled, mode: int) -> None:
    reader = Reader.open(path)
    path.chmod(mode)
    with pytest.raises(UntrustedFile, match=rf"written by others \(mode {mode:04o}\).*chmod go-w"):
        reader.artifact(filled.artifacts[0].checksum)
    path.chmod(0o644)
    assert reader.artifact(filled.artifacts[0].checksum) == filled.artifacts[0].data


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
@pytest.mark.usefixtures("filled")
def test_a_directory_that_others_can_write_is_refused(path: Path, mode: int) -> None:
    path.parent.chmod(mode)
    with pytest.raises(UntrustedFile, match="written by others"):
        Reader.open(path)
    path.parent.chmod(0o755)
    Reader.open(path)


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
@pytest.mark.usefixtures("filled")
def test_what_lies_beside_the_file_is_checked_too(path: Path, suffix: str) -> None:
    beside = path.with_name(path.name + suffix)
    beside.touch()
    beside.chmod(0o666)
    with pytest.raises(UntrustedFile, match=suffix):
        check_private(path)


def test_a_link_is_judged_by_what_it_names(path: Path, filled: Filled, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    assert Reader.open(link).plans_for(*SIGNATURE) == (filled.plan,)
    path.chmod(0o666)
    with pytest.raises(UntrustedFile):
        Reader.open(link)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.usefixtures("filled")
def test_another_users_file_is_refused(path: Path) -> None:
    os.chown(path, 12345, -1)
    with pytest.raises(UntrustedFile, match=r"belongs to another user \(uid 12345\)"):
        Reader.open(path)


@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_a_new_database_is_trusted_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with Store.open(tmp_path / "new.db") as store:
            fill(store)
            check_private(tmp_path / "new.db")
    finally:
        os.umask(before)
    assert Reader.open(tmp_path / "new.db").plans_for(*SIGNATURE)


def test_it_needs_the_standard_library_alone() -> None:
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, tilewright.tuning_db.reader; "
            "others = ('sqlalchemy', 'alembic', 'torch', 'cryptography'); "
            "print([name for name in sys.modules if name.partition('.')[0] in others])",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "[]\n"


def test_a_plan_may_name_the_fallback_alone_and_a_kernel_no_artifact(path: Path, writer: Store) -> None:
    fill(writer)
    writer.add_kernel(kernel(key="d" * 64), [])
    writer.put_plan(plan(None))
    reader = Reader.open(path)
    assert reader.kernel("d" * 64).artifacts == ()
    (found,) = reader.plans_for(*SIGNATURE)
    assert [entry.kernel_key for entry in found.entries] == [None, None]
