"""Transactions over SQLite or PostgreSQL: short, retried while another process holds the lock, clear when they fail."""

import os
import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.orm import Session

from tilewright import disks
from tilewright.errors import TilewrightError
from tilewright.plain_text import without_passwords
from tilewright.tuning_db import codec, faults
from tilewright.tuning_db.confined import ConfinedConnection
from tilewright.tuning_db.integrity import check_private, check_private_folder
from tilewright.tuning_db.locations import require_file
from tilewright.tuning_db.schema import read_only_uri, read_write_uri, require_current, schema_version
from tilewright.tuning_db.signing import require_signed

T = TypeVar("T")

BUSY_SECONDS = 30.0
"""How long a transaction is tried while other processes hold the lock."""

# SQLite waits this long by itself. Its waiting is unfair to whoever came first, so the long wait is our own.
_SQLITE_WAIT_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 0.25
_POSTGRESQL_TRANSIENT = {"40001", "40P01", "55P03"}  # serialization failure, deadlock, lock not available


class Database:
    """An engine and the two ways to use it: ``read`` and ``write``."""

    def __init__(self, engine: Engine, name: str, path: Path | None) -> None:
        self.engine = engine
        self.name = name
        """The path or the URL, without a password: for messages."""
        self.path = path
        self._writing = engine.execution_options(tilewright_writes=True)

    def write(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in one transaction that excludes other writers. It may run several times, but commits once."""
        return self._attempt(self._writing, work)

    def read(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in one transaction that sees one state of the database and blocks no writer."""
        return self._attempt(self.engine, work)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _attempt(self, engine: Engine, work: Callable[[Session], T]) -> T:
        deadline = time.monotonic() + BUSY_SECONDS
        pause = 0.002
        while True:
            try:
                with Session(engine) as session, session.begin():
                    return work(session)
            except IntegrityError as error:
                raise ValueError(
                    f"a record does not fit the database ({error.orig}); its run, device or kernel must be stored first"
                ) from error
            except DBAPIError as error:
                if not _is_transient(error) or time.monotonic() > deadline:
                    raise self._explain(error) from error
            except (codec.UndecodableError, UnicodeDecodeError) as error:
                raise faults.damaged(self.name, str(error)) from error
            time.sleep(random.uniform(0, pause))
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _explain(self, error: DBAPIError) -> TilewrightError:
        if self.path is not None and isinstance(error.orig, sqlite3.Error):
            return faults.explain(error.orig, self.path)
        reason = str(error.orig).strip().partition("\n")[0]
        return TilewrightError(f"the database {self.name} refused: {reason}; check the server and the URL")


def open_sqlite(path: Path, *, create: bool) -> Database:
    """Open a SQLite file for reading and writing, in WAL mode. ``create``: make it, empty, where there is none."""
    if create:
        _create_file(path)
    real = _checked(path)

    def connected(connection: sqlite3.Connection, _record: object) -> None:
        # The check comes first: a database of another program must not even be switched to WAL.
        schema_version(connection, path)
        if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    engine = _sqlite_engine(path, lambda: _connect(real, read_write_uri(real), writes=True), connected)
    return Database(engine, str(path), path)


def open_sqlite_read_only(path: Path, *, verify_key: Path | None = None) -> Database:
    """Open a SQLite file that may be on read-only media; every write to it fails.

    With ``verify_key``, it must have been signed by that public key.
    """
    real = _checked(path, verify_key)
    signed = verify_key is not None

    def connected(connection: sqlite3.Connection, _record: object) -> None:
        require_current(schema_version(connection, path), path)

    engine = _sqlite_engine(path, lambda: _connect(real, read_only_uri(real, signed=signed), writes=False), connected)
    return Database(engine, str(path), path)


def _checked(path: Path, verify_key: Path | None = None) -> Path:
    """The real path of a database that nobody else can have written. Raises TilewrightError."""
    require_file(path)
    try:
        real = check_private(path)
        if verify_key is not None:
            require_signed(real, verify_key)
        return real
    except OSError as error:  # it was there a moment ago
        raise TilewrightError(f"the database {path} cannot be read: {error.strerror}; try again") from error


def open_server(text: str, *, read_only: bool = False) -> Database:
    """Open a PostgreSQL database by its URL."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:  # a port that is no number is the latter
        raise TilewrightError(f"{text!r} is neither a path nor a database URL; give one of them to --db") from error
    name = without_passwords(url.render_as_string(hide_password=True))
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise TilewrightError(f"the database {name} is of an unsupported kind; use a SQLite path or PostgreSQL")
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    try:
        engine = _create_engine(url, execution_options={"postgresql_readonly": read_only})
    except NoSuchModuleError as error:
        raise TilewrightError(f"the database {name} needs an unknown driver; use postgresql+psycopg://") from error
    except ModuleNotFoundError as error:
        raise TilewrightError(
            f"the database {name} needs the package {error.name}; run `pip install 'tilewright[postgresql]'`"
        ) from error
    return Database(engine, name, None)


def _is_transient(error: DBAPIError) -> bool:
    if isinstance(error.orig, sqlite3.Error):
        return faults.is_transient(error.orig)
    return getattr(error.orig, "sqlstate", None) in _POSTGRESQL_TRANSIENT


def _create_file(path: Path) -> None:
    """Make an empty file that its group cannot write whatever the umask is, for the runtime refuses such files."""
    try:
        if path.exists():
            return
        check_private_folder(path.parent)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return
    except OSError as error:
        raise TilewrightError(
            f"the database {path} cannot be made: {disks.reason(error)}; name another file with --db"
        ) from error


def _connect(path: Path, uri: str, *, writes: bool) -> ConfinedConnection:
    # Transactions are begun by us alone (isolation_level None). The pool hands a connection to one thread at a time.
    connection = sqlite3.connect(
        uri,
        uri=True,
        timeout=_SQLITE_WAIT_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        factory=ConfinedConnection,
    )
    connection.confine(path, writes=writes)
    return connection


def _sqlite_engine(
    path: Path, connect: Callable[[], sqlite3.Connection], connected: Callable[[sqlite3.Connection, object], None]
) -> Engine:
    engine = _create_engine(URL.create("sqlite", database=str(path)), creator=connect)
    event.listen(engine, "connect", connected)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("tilewright_writes", False)
        confined = connection.connection.driver_connection
        assert isinstance(confined, ConfinedConnection)
        confined.allow(writes=writes)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _create_engine(url: URL, **options: Any) -> Engine:
    return create_engine(url, json_serializer=codec.dumps, json_deserializer=codec.loads, **options)
