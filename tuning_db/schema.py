"""The schema's version and how a SQLite file says that it is ours."""

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from tilewright.errors import TilewrightError
from tilewright.tuning_db.confined import require_plain_schema
from tilewright.tuning_db.faults import damaged

SCHEMA_VERSION = 6
"""What this release reads and writes; ``PRAGMA user_version`` of a SQLite file, set by the migrations."""

APPLICATION_ID = int.from_bytes(b"TWdb")
"""``PRAGMA application_id`` of a SQLite file."""

VERSION_TABLE = "tilewright_alembic_version"
"""In which Alembic keeps which migrations were made."""

TABLES: dict[str, frozenset[str]] = {
    name: frozenset(columns.split())
    for name, columns in {
        VERSION_TABLE: "version_num",
        "runs": "id command versions host started_at finished_at",
        "devices": "key name arch facts",
        "artifacts": "checksum kind abi_version data",
        "kernels": (
            "key op signature_key signature template config arch source recipe toolchain facts checked created_at seal"
        ),
        "kernel_artifacts": "kernel_key position checksum",
        "trials": (
            "id run_id op signature_key problem_key problem device_key threads template config kernel_key outcome "
            "timing median_us low_us high_us samples_us error message seed search build_s conditions created_at"
        ),
        "plans": (
            "id op signature_key signature device_key threads precision error batch_invariant model layout timing "
            "checked facts created_at seal"
        ),
        "plan_entries": "plan_id position max_size kernel_key median_us default_us tuned_size",
    }.items()
}
"""Columns of each table of this version: those of ``models``, which readers do not import."""


def schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of the schema in a SQLite file; 0 for a file with nothing in it yet.

    Raises TilewrightError for a database of another program or of a newer tilewright, sqlite3.Error for a damaged one.
    """
    # One transaction, for another process may be making the schema at this moment.
    connection.execute("BEGIN")
    try:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        empty = connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone() is None
        ours = application_id == APPLICATION_ID and version <= SCHEMA_VERSION
        if ours:
            require_plain_schema(connection, path, TABLES, current=version == SCHEMA_VERSION)
    finally:
        # Not by a statement: after an error of the disk no transaction is left, and a failing ROLLBACK would hide it.
        connection.rollback()
    if application_id != APPLICATION_ID:
        if not empty:
            raise TilewrightError(f"{path} is a database of another program; name another file with --db")
        return 0
    if version > SCHEMA_VERSION:
        raise newer_schema(str(path), f"version {version}")
    _require_whole_pages(connection, path)
    return int(version)


def _require_whole_pages(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that ends inside a page: SQLite would read the rest of it as zeros."""
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    log = path.resolve().with_name(path.resolve().name + "-wal")
    # A log that has not been written back yet may well end a file that a killed process left.
    if path.stat().st_size % page_size and not (log.exists() and log.stat().st_size):
        raise damaged(path, "its end is missing")


def require_current(version: int, path: Path) -> None:
    """Refuse to read a file whose schema is older than this release's; only a writer may upgrade it."""
    if version == 0:
        raise TilewrightError(f"the database {path} is empty; run `tune` to fill it")
    if version < SCHEMA_VERSION:
        raise TilewrightError(
            f"the database {path} was written by an older tilewright (schema version {version}, "
            f"this one reads {SCHEMA_VERSION}); run `tune` on it once to upgrade it"
        )


def newer_schema(name: str, found: str) -> TilewrightError:
    """Make the one refusal of a database that a newer release has written."""
    return TilewrightError(
        f"the database {name} was written by a newer tilewright (schema {found}, this one knows version "
        f"{SCHEMA_VERSION}); upgrade tilewright or name another database with --db"
    )


def read_only_uri(path: Path, *, signed: bool = False) -> str:
    """Return the SQLite URI that opens ``path`` for reading, beside writers and on media that cannot be written.

    SQLite needs shared memory beside a WAL database. Where it cannot be made and no log waits to be read, the file is
    opened as immutable instead. So is a ``signed`` one: what lies beside it was not signed.
    """
    real = path.resolve()
    has_log = real.with_name(real.name + "-wal").exists()
    immutable = signed or (not has_log and not os.access(real.parent, os.W_OK))
    return f"file:{quote(os.fsencode(real))}?mode=ro{'&immutable=1' if immutable else ''}"


def read_write_uri(path: Path) -> str:
    """Return the SQLite URI that opens ``path`` for writing and does not make it where it is missing."""
    return f"file:{quote(os.fsencode(path.resolve()))}?mode=rw"
