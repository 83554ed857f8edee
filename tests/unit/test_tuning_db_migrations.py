"""Every schema version that was ever released is stored as a small database; each must keep every row when upgraded."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from tuning_db_samples import DEVICE, artifact, kernel

from tilewright.errors import TilewrightError
from tilewright.tuning_db import migrations
from tilewright.tuning_db.connection import open_sqlite
from tilewright.tuning_db.migrations import VERSION_TABLE, upgrade_database
from tilewright.tuning_db.models import Base
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.schema import APPLICATION_ID, SCHEMA_VERSION
from tilewright.tuning_db.store import Store

STORED = sorted((Path(__file__).parents[1] / "data" / "databases").glob("v*.db"))


def rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table but Alembic's own."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").fetchall()
        return {
            table: [dict(row) for row in connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid')]
            for (table,) in tables
            if table != VERSION_TABLE
        }


def test_there_is_a_stored_database_of_every_version() -> None:
    assert [path.stem for path in STORED] == [f"v{version}" for version in range(1, SCHEMA_VERSION + 1)]
    versions = Path(migrations.__file__).parent / "versions"
    assert len(list(versions.glob("v[0-9]*.py"))) == SCHEMA_VERSION


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_opening_an_old_database_keeps_every_row(stored: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    shutil.copyfile(stored, path)
    before = rows(path)
    assert all(before.values()), "a stored database has rows in every table"

    with Store.open(path, create=False) as store:
        assert store.check() == []
        assert store.devices() == [DEVICE]
        assert store.kernels() == [kernel(artifact(), artifact(b"a second object"))]
        assert store.counts().trials == len(before["trials"]) == len(store.trials())

    after = rows(path)
    for table, old_rows in before.items():
        assert len(after[table]) == len(old_rows)
        for old, new in zip(old_rows, after[table], strict=True):
            kept = (old.keys() & new.keys()) - {"seal"}  # over other names since version 5
            assert {name: new[name] for name in kept} == {name: old[name] for name in kept}
    assert Reader.open(path).plan("moe_gemm", "signature-1", DEVICE.key, 2) is not None


def test_the_migrations_make_the_models(tmp_path: Path) -> None:
    Store.open(tmp_path / "new.db").close()
    engine = create_engine(f"sqlite:///{tmp_path}/new.db")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_new_database_says_what_it_is(tmp_path: Path) -> None:
    Store.open(tmp_path / "new.db").close()
    with closing(sqlite3.connect(tmp_path / "new.db")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    database = open_sqlite(path, create=True)

    def fail_after_upgrading(session: Session) -> None:
        upgrade_database(session.connection())
        assert session.execute(text("PRAGMA user_version")).scalar() == SCHEMA_VERSION
        raise RuntimeError("the machine went down")

    with pytest.raises(RuntimeError):
        database.write(fail_after_upgrading)
    database.close()
    assert rows(path) == {}
    with pytest.raises(TilewrightError, match="is empty"):
        Reader.open(path)
    with Store.open(path) as store:
        assert store.counts().trials == 0
