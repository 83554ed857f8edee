"""SQLite connections that a crafted file cannot keep busy, fill memory with, or make run what its schema says.

A file says by itself what its tables are. So before anything of it is read, its schema must be tables and indexes of
ours and nothing else: no view, no trigger, no virtual table, no computed column, no condition. Its pages may still
contradict each other (a page that is its own child, a row that is longer than the file), so that what a statement may
do and give is bounded by the size of the file, in steps of SQLite's machine, which a busy computer does not change.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tilewright.tuning_db.faults import damaged
from tilewright.tuning_db.integrity import DamagedDatabase

R = TypeVar("R", bound=Iterable[Any])

_FEWEST_STEPS = 20_000_000
_STEPS_PER_BYTE = 20
_STEPS_AT_ONCE = 10_000
"""Of SQLite's machine, before it asks whether it may go on."""
_WRITING = 10
"""Times as many steps for what is being added."""
_LARGEST_VALUE_BYTES = 256 << 20
_LEAST_ROW_BYTES = 16
_MEANWHILE_BYTES = 1 << 20

_LONGEST_DEFINITION = 20_000
"""Characters of a table's or an index's SQL."""

_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 1 << 20,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_ATTACHED: 1,  # VACUUM attaches one
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}

_NO_CODE = re.compile(r"\"(?:[^\"]|\"\")*\"|'(?:[^']|'')*'|`(?:[^`]|``)*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
"""Names in quotes, texts and comments, as SQLite finds them from left to right."""
_WORD = re.compile(r"\w+")
_COMPUTES = frozenset({"AS", "CHECK", "COLLATE", "GENERATED", "USING", "VIRTUAL", "WHERE"})
"""Words of a table or an index that is more than columns."""
_INDEX = re.compile(r"CREATE (?:UNIQUE )?INDEX \w+ ON \w+ ?\((?:\w+(?:, ?)?)+\)", re.IGNORECASE)
_DEFAULT_EXPRESSION = re.compile(r"\bDEFAULT\s*\(", re.IGNORECASE)


class ConfinedConnection(sqlite3.Connection):
    """A connection whose statements end, together, after as many steps as reading all of a sound file could take."""

    _path: Path
    _steps_left = _FEWEST_STEPS

    def confine(self, path: Path, *, writes: bool) -> None:
        """Set limits that a sound file stays within. Of a file that is only read, no value is larger than the file."""
        self._path = path
        most_bytes = _LARGEST_VALUE_BYTES if writes else min(_LARGEST_VALUE_BYTES, room_bytes(path))
        for kind, most in {**_LIMITS, sqlite3.SQLITE_LIMIT_LENGTH: most_bytes}.items():
            self.setlimit(kind, most)
        self.allow(writes=writes)
        self.set_progress_handler(self._count, _STEPS_AT_ONCE)
        self.execute("PRAGMA trusted_schema = OFF")
        self.execute("PRAGMA cell_size_check = ON")

    def allow(self, *, writes: bool) -> None:
        """Let the statements to come take as many steps, together, as a file of this size can need."""
        self._steps_left = (_FEWEST_STEPS + _STEPS_PER_BYTE * room_bytes(self._path)) * (_WRITING if writes else 1)

    def _count(self) -> bool:
        self._steps_left -= _STEPS_AT_ONCE
        return self._steps_left < 0


def room_bytes(path: Path) -> int:
    """What a SQLite file and the log beside it can hold, and what a writer may add while they are read."""
    real = path.resolve()
    total = _MEANWHILE_BYTES
    for part in (real, real.with_name(real.name + "-wal")):
        try:
            total += part.stat().st_size
        except FileNotFoundError:
            continue
    return total


def limited(rows: Iterable[R], path: Path) -> Iterator[R]:
    """Pass on the ``rows`` of a statement that gives each value of the file ``path`` once.

    Raises:
        DamagedDatabase: where they hold more than the file does.

    """
    most_bytes = room_bytes(path)
    held_bytes = 0
    for row in rows:
        held_bytes += _LEAST_ROW_BYTES + sum(len(value) for value in row if isinstance(value, str | bytes))
        if held_bytes > most_bytes:
            raise damaged(path, "its rows hold more than the file does")
        yield row


def require_plain_schema(
    connection: sqlite3.Connection, path: Path, tables: dict[str, frozenset[str]], *, current: bool
) -> None:
    """Refuse a file whose schema is anything but ``tables`` (columns by name), with indexes over columns.

    Of a file that is not ``current``, a table may be missing, and columns may be others.

    Raises:
        DamagedDatabase: names what does not belong there.

    """
    found: set[str] = set()
    for kind, name, text in connection.execute("SELECT type, name, sql FROM sqlite_schema"):
        if kind not in ("table", "index") or not isinstance(name, str) or not isinstance(text, str | None):
            raise _foreign(path, f"a {kind!s:.20} {name!r:.60}")
        if len(text or "") > _LONGEST_DEFINITION:
            raise _foreign(path, f"a {kind} {name!r:.60} of {len(text or '')} characters")
        if kind == "index":
            if text is not None and not _INDEX.fullmatch(_bare(text)):
                raise _foreign(path, f"an index {name!r:.60} of its own")
        elif name not in tables:
            if not name.startswith("sqlite_stat"):
                raise _foreign(path, f"a table {name!r:.60}")
        else:
            bare = _NO_CODE.sub(" ", text or "")
            if _COMPUTES & {word.upper() for word in _WORD.findall(bare)} or _DEFAULT_EXPRESSION.search(bare):
                raise _foreign(path, f"a table {name!r} that computes")
            found.add(name)
    if not current:
        return
    if missing := tables.keys() - found:
        raise damaged(path, f"it has no table {min(missing)!r}")
    for name, columns in tables.items():
        rows = connection.execute(f'PRAGMA table_xinfo("{name}")').fetchall()
        if {row[1] for row in rows} != columns or any(row[6] for row in rows):
            raise damaged(path, f"its table {name!r} has other columns than tilewright gives it")


def _bare(text: str) -> str:
    """An index without quotes around names, and without whitespace that says nothing."""
    return " ".join(_NO_CODE.sub(lambda found: found[0][1:-1] if found[0][1:-1].isidentifier() else "?", text).split())


def _foreign(path: Path, what: str) -> DamagedDatabase:
    return damaged(path, f"it has {what}, which tilewright makes none of")
