"""What SQLite's errors mean to a user, in one sentence each."""

import sqlite3
from pathlib import Path

from tilewright import disks
from tilewright.errors import TilewrightError
from tilewright.tuning_db.integrity import DamagedDatabase

_LONGEST = 200
_TRANSIENT = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_FULL = f"{disks.FULL} and run again, for what was stored is whole"
_MEANINGS = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_IOERR: "reading or writing it failed; check the disk's free space, quota and health",
    sqlite3.SQLITE_READONLY: "it cannot be written; make the file and its directory writable or use another with --db",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check that the file and its directory exist and are accessible",
    sqlite3.SQLITE_PERM: "access to it was denied; check its permissions",
    sqlite3.SQLITE_AUTH: "access to it was denied; check its permissions",
    sqlite3.SQLITE_NOMEM: "reading it takes more memory than there is; free some and run again",
}
_DISK_WOULD_DO_IT = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
"""What SQLite calls it, too, when it finds no room for a log, for shared memory or for another file."""


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
    if code in _DISK_WOULD_DO_IT and disks.is_full(path.resolve().parent):
        return TilewrightError(f"the database {path}: {_FULL} ({_told(error)})")
    meaning = _MEANINGS.get(code) if code is not None else None
    if meaning is not None:
        return TilewrightError(f"the database {path}: {meaning} ({_told(error)})")
    if code == sqlite3.SQLITE_NOTADB:
        return DamagedDatabase(f"{path} is not a database, or is damaged from its start; name another file with --db")
    if code == sqlite3.SQLITE_INTERRUPT:
        return damaged(path, "reading it takes longer than a sound file of its size can")
    if code == sqlite3.SQLITE_TOOBIG:
        return damaged(path, "it holds a value that is larger than any that is stored")
    # Damage shows as many errors: malformed pages, a table that is gone, text that is no text.
    return damaged(path, _told(error))


def damaged(path: Path | str, detail: str) -> DamagedDatabase:
    """Make the clear failure for a database whose content cannot be what was written."""
    return DamagedDatabase(
        f"the database {path} is damaged ({detail}); restore it from a copy, or move it away and tune again"
    )


def _told(error: sqlite3.Error) -> str:
    """What SQLite said, which may name what a file calls its tables."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _primary_code(error: sqlite3.Error) -> int | None:
    """SQLite's result code without its extended part; None for an error that Python itself raised."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
