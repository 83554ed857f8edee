"""A file whose schema says more than ours, or whose pages lead in circles, is refused before it keeps anybody busy."""

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text
from tuning_db_samples import Filled, fill

from tilewright.errors import TilewrightError
from tilewright.tuning_db.codec import UndecodableError, loads
from tilewright.tuning_db.integrity import DamagedDatabase
from tilewright.tuning_db.models import Base
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.schema import TABLES, VERSION_TABLE
from tilewright.tuning_db.store import Store

LEAF, INNER = 13, 5  # kinds of pages
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT "


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Filled]:
    path = tmp_path_factory.mktemp("sound") / "tuning.db"
    with Store.open(path) as store:
        filled = fill(store)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    return path, filled


@pytest.fixture
def path(sound: tuple[Path, Filled], tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return Path(shutil.copy(sound[0], tmp_path / "tuning.db"))


def change(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
        connection.commit()


OPENINGS: tuple[Callable[[Path], object], ...] = (Reader.open, Store.open_read_only, Store.open)


def columns(table: str) -> str:
    return ", ".join(f"n AS {name}" for name in sorted(TABLES[table]))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (f"DROP TABLE plans; CREATE VIEW plans AS {ENDLESS} {columns('plans')} FROM c", "it has a view 'plans'"),
        (f"DROP TABLE kernels; CREATE VIEW kernels AS {ENDLESS} {columns('kernels')} FROM c", "a view 'kernels'"),
        ("CREATE VIEW more AS SELECT load_extension('/tmp/x.so')", "a view 'more'"),
        ("CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM plans; END", "a trigger 't'"),
        ("CREATE TABLE more (id INTEGER)", "a table 'more'"),
        ("CREATE VIRTUAL TABLE more USING fts5(x)", "a table 'more"),
        ("DROP TABLE plan_entries", "it has no table 'plan_entries'"),
        ("ALTER TABLE kernels RENAME COLUMN arch TO arci", "'kernels' has other columns"),
        ("ALTER TABLE runs ADD COLUMN more TEXT", "'runs' has other columns"),
        ("ALTER TABLE runs ADD COLUMN more TEXT AS (hex(host))", "a table 'runs' that computes"),
        ("CREATE INDEX more ON runs (hex(host))", "an index 'more' of its own"),
        ("CREATE INDEX more ON runs (host) WHERE host > 'a'", "an index 'more' of its own"),
        (
            "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = replace(sql, 'host TEXT NOT NULL', "
            "'host TEXT /*\"*/ CHECK (length(host) > 0) /*\"*/ NOT NULL') WHERE name = 'runs'",
            "a table 'runs' that computes",
        ),
        (
            "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = replace(sql, 'host TEXT', "
            "'host TEXT' || ' -- ' || hex(zeroblob(20000)) || char(10)) WHERE name = 'runs'",
            "a table 'runs' of",
        ),
        ("PRAGMA writable_schema = ON; UPDATE sqlite_schema SET type = 'view' WHERE name = 'runs'", "damaged"),
    ],
)
@pytest.mark.parametrize("opening", OPENINGS)
def test_a_schema_that_is_not_ours_is_refused(
    path: Path, opening: Callable[[Path], object], script: str, said: str
) -> None:
    change(path, script)
    with pytest.raises(DamagedDatabase) as refused:
        opening(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_index_and_statistics_of_ones_own_are_let_be(path: Path, sound: tuple[Path, Filled]) -> None:
    change(path, 'CREATE INDEX "mine" ON runs ("host",  id); ANALYZE')
    with Store.open(path) as store:
        assert store.check() == []
    assert Reader.open(path).plans_for("moe_gemm", "signature-1") == (sound[1].plan,)


def test_readers_know_the_columns_of_the_models() -> None:
    ours = {name: frozenset(table.columns.keys()) for name, table in Base.metadata.tables.items()}
    assert {name: columns for name, columns in TABLES.items() if name != VERSION_TABLE} == ours


def root_of(path: Path, table: str) -> tuple[int, int]:
    with closing(sqlite3.connect(path)) as connection:
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchall()
        ((page_bytes,),) = connection.execute("PRAGMA page_size").fetchall()
    return root, page_bytes


def lead_in_circles(path: Path, table: str, levels: int = 5) -> None:
    """The root of a table becomes an inner page with 500 times one child, that likewise, and so on down to its rows."""
    root, page_bytes = root_of(path, table)
    content = bytearray(path.read_bytes())
    leaf = bytes(content[(root - 1) * page_bytes : root * page_bytes])
    assert leaf[0] == LEAF
    count = (page_bytes - 12) // 8
    pages = len(content) // page_bytes
    for level in range(levels):
        child = pages + 1 + level
        page = bytearray(page_bytes)
        page[0] = INNER
        page[3:5] = count.to_bytes(2, "big")
        page[5:7] = (12 + 2 * count).to_bytes(2, "big")
        page[8:12] = child.to_bytes(4, "big")
        for cell in range(count):
            at = 12 + 2 * count + 5 * cell
            page[12 + 2 * cell : 14 + 2 * cell] = at.to_bytes(2, "big")
            page[at : at + 5] = child.to_bytes(4, "big") + bytes([min(cell, 127)])
        if level == 0:
            content[(root - 1) * page_bytes : root * page_bytes] = page
        else:
            content += page
    content += leaf
    content[28:32] = (len(content) // page_bytes).to_bytes(4, "big")
    path.write_bytes(content)


def test_pages_that_lead_in_circles_end_in_one_sentence(path: Path) -> None:
    lead_in_circles(path, "trials")
    begin = time.thread_time()
    with Store.open_read_only(path) as store:
        with pytest.raises(DamagedDatabase, match=r"longer than a sound file of its size|more than the file does"):
            store.trials()
        with pytest.raises(DamagedDatabase, match="longer than a sound file of its size"):
            store._database.read(lambda session: session.scalar(text("SELECT sum(median_us) FROM trials")))
    assert time.thread_time() - begin < 30, "it was read for too long"


def test_what_is_no_file_is_not_waited_for(path: Path) -> None:
    fifo = path.with_name("fifo")
    os.mkfifo(fifo)
    for opening in OPENINGS:
        with pytest.raises(TilewrightError, match="is not a file"):
            opening(fifo)
        for name in ("-journal", "-wal"):
            beside = path.with_name(path.name + name)
            os.mkfifo(beside)
            with pytest.raises(TilewrightError, match="is not a file; remove it"):
                opening(path)
            beside.unlink()


@pytest.mark.parametrize(
    "document",
    [
        "1" * 400,
        "-" + "9" * 19,
        "18446744073709551616",
        "[1e999]",
        "[-1E+400]",
        "NaN",
        "[Infinity]",
        '{"a": -Infinity}',
        "[" * 100_000,
        '"' + "x" * (5 << 20) + '"',
        "{",
    ],
)
def test_a_document_that_we_would_not_write_is_refused(document: str) -> None:
    with pytest.raises(UndecodableError):
        loads(document)


@pytest.mark.parametrize("value", [18446744073709551615, -9223372036854775808, 1e300, 0.1234567890123456789, "9" * 64])
def test_numbers_of_64_bits_are_read_as_they_are(value: object) -> None:
    assert loads(json.dumps([value])) == [value]
