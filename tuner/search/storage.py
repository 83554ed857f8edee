"""Where Optuna studies live: in memory, or where Optuna's tools (its dashboard above all) can look at them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from tilewright import disks
from tilewright.errors import TilewrightError
from tilewright.plain_text import without_passwords
from tilewright.reading import open_file
from tilewright.trust import UntrustedFile, stranger_at

JOURNAL: Final = "journal://"
"""Before the path of a journal; a path alone means the same."""

_EXAMPLES: Final = "give a file for Optuna's journal, such as studies.log, or a database, such as sqlite:///studies.db"

_LONGEST_LINE: Final = 1 << 20
_LARGEST_JOURNAL: Final = 1 << 30
"""All of which Optuna reads into memory."""

_OPTUNAS_TABLE: Final = "version_info"
"""A table that every database of Optuna's has, and none of ours."""


@lru_cache(maxsize=4)
def open_storage(url: str) -> BaseStorage | None:
    """Open the storage that ``--study`` names, and make it where there is none; None, in memory, for no name.

    Args:
        url: a file for Optuna's journal (``studies.log``, ``journal://studies.log``), or a URL of SQLAlchemy's for
            Optuna's own tables (``sqlite:///studies.db``, ``postgresql+psycopg://...``).

    Raises:
        TilewrightError: when it cannot be opened, or holds something else than Optuna studies.

    """
    if not url:
        return None
    with _refusing(url):
        if url.startswith(JOURNAL) or "://" not in url:
            return _open_journal(Path(url.removeprefix(JOURNAL)))
        parsed = sqlalchemy.make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            _refuse_strangers(Path(parsed.database))
        _refuse_other_tables(url)
        return RDBStorage(url)


@contextmanager
def saying_where(url: str) -> Iterator[None]:
    """Turn what the storage that ``--study`` names raises while it is in use into a sentence.

    Raises:
        TilewrightError: when the storage fails.

    """
    try:
        yield
    except (StorageInternalError, SQLAlchemyError, OSError) as error:
        said = disks.reason(error) if isinstance(error, OSError) else _first_line(error)
        raise TilewrightError(
            f"--study {_shown(url)} took no more trials ({said}); ours are in the database, "
            "so go on with --resume, and another --study or none"
        ) from error


@contextmanager
def _refusing(url: str) -> Iterator[None]:
    try:
        yield
    except TilewrightError:
        raise
    except ImportError as error:
        raise TilewrightError(f"--study {_shown(url)} needs the package {error.name}; pip install it") from error
    except OSError as error:
        if (meaning := disks.meaning(error)) is None:
            raise TilewrightError(
                f"--study {_shown(url)} cannot be opened ({error.strerror or _first_line(error)}); {_EXAMPLES}"
            ) from error
        raise TilewrightError(f"--study {_shown(url)} cannot be written: {meaning}") from error
    except Exception as error:  # whatever a driver that we do not know raises
        raise TilewrightError(f"--study {_shown(url)} cannot be opened ({_first_line(error)}); {_EXAMPLES}") from error


def _open_journal(path: Path) -> BaseStorage:
    _refuse_strangers(path)
    if path.exists():
        open_file(path, _LARGEST_JOURNAL).close()
    if path.is_file() and not _begins_as_a_journal(path):
        raise TilewrightError(f"--study {path} is a file, but no journal of Optuna's; name a new one")
    return JournalStorage(JournalFileBackend(str(path)))


def _refuse_strangers(path: Path) -> None:
    """Samplers of Optuna's keep their state in a study as a pickle, which is code."""
    if path.exists() and (found := stranger_at(path, path.stat())):
        raise UntrustedFile(
            f"--study {path} {found.how}, and studies can hold code, as Python's pickles; name another one"
        )


def _begins_as_a_journal(path: Path) -> bool:
    """Whether the first line is an operation, or there is none; Optuna passes over a last line that is none."""
    with path.open("rb") as file:
        line = file.readline(_LONGEST_LINE)
    try:
        first = json.loads(line or '{"op_code": 0}')
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get("op_code"), int)


def _refuse_other_tables(url: str) -> None:
    """Optuna would add its tables to a database that is not its own, to ours for example."""
    if sqlalchemy.make_url(url).get_backend_name() == "sqlite":
        file = Path(sqlalchemy.make_url(url).database or "")
        if file.exists() and not file.is_file():
            raise TilewrightError(f"--study {_shown(url)} is no file; name a new database")
    engine = sqlalchemy.create_engine(url)
    try:
        tables = sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()
    if tables and _OPTUNAS_TABLE not in tables:
        raise TilewrightError(f"--study {_shown(url)} holds other things than Optuna studies; name a new database")


def _shown(url: str) -> str:
    """Without a password."""
    return without_passwords(url)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
