"""What SQLite's errors mean to a user, in one sentence each."""

import sqlite3
from pathlib import Path

from tilewright.errors import TilewrightError
from tilewright.tuning_db.integrity import DamagedDatabase

_TRANSIENT = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_MEANINGS = {
    sqlite3.SQLITE_FULL: "the disk is full; free some space and run again",
    sqlite3.SQLITE_IOERR: "reading or writing it failed; check the disk's free space, quota and health",
    sqlite3.SQLITE_READONLY: "it cannot be written; make the file and its directory writable or use another with --db",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check that the file and its directory exist and are accessible",
    sqlite3.SQLITE_PERM: "access to it was denied; check its permissions",
}


def is_transient(error: sqlite3.Error) -> bool:
    """Whether another process held a lock, so that trying again can succeed."""
    return _primary_code(error) in _TRANSIENT


def explain(error: sqlite3.Error, path: Path) -> TilewrightError:
    """Make the clear failure for an error met in the SQLite file ``path``."""
    code = _primary_code(error)
    if code in _TRANSIENT:
        return TilewrightError(
            f"the database {path} stayed locked by another process; wait for it, or stop it, and run again"
        )
    meaning = _MEANINGS.get(code) if code is not None else None
    if meaning is not None:
        return TilewrightError(f"the database {path}: {meaning} ({error})")
    if code == sqlite3.SQLITE_NOTADB:
        return DamagedDatabase(f"{path} is not a database, or is damaged from its start; name another file with --db")
    # Damage shows as many errors: malformed pages, a table that is gone, text that is no text.
    return damaged(path, str(error))


def damaged(path: Path | str, detail: str) -> DamagedDatabase:
    """Make the clear failure for a database whose content cannot be what was written."""
    return DamagedDatabase(
        f"the database {path} is damaged ({detail}); restore it from a copy, or move it away and tune again"
    )


def _primary_code(error: sqlite3.Error) -> int | None:
    """SQLite's result code without its extended part; None for an error that Python itself raised."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
