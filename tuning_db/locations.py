"""Where the database is: a path, a SQLite URL, or the URL of another server."""

import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote

from tilewright.directories import DATABASE_VARIABLE, KEY_VARIABLE, user_data_directory
from tilewright.errors import TilewrightError
from tilewright.tuning_db.integrity import SIDECARS

_SQLITE_URL = re.compile(r"sqlite(?:\+pysqlite)?://(?P<rest>.*)", re.DOTALL)


def user_database() -> Path:
    """Return the path of the user's own database.

    Raises TilewrightError where that is in the user's home and there is none.
    """
    return user_data_directory() / "tuning.db"


def default_url() -> str:
    """Return what is used where no database is named: ``$TILEWRIGHT_DB`` (a path or a URL), else the user's own."""
    return os.environ.get(DATABASE_VARIABLE) or str(user_database())


def default_key() -> Path | None:
    """Return the public key by which packs have to be signed where none is named: ``$TILEWRIGHT_VERIFY_KEY``."""
    named = os.environ.get(KEY_VARIABLE)
    return Path(named).expanduser() if named else None


def sqlite_path(url_or_path: str | os.PathLike[str]) -> Path | None:
    """Return the file that a path or SQLite URL names; None for the URL of another kind of database.

    Raises TilewrightError for a SQLite URL that names no file or carries options.
    """
    text = os.fspath(url_or_path)
    url = _SQLITE_URL.fullmatch(text)
    if url is None:
        if "://" in text:
            return None
        name = text
    else:
        name = unquote(url["rest"].removeprefix("/"), errors="surrogateescape")
        if "?" in url["rest"]:
            raise TilewrightError(f"the database {text!r} carries options that do nothing; give the path alone")
    if name in ("", ":memory:"):
        raise TilewrightError(f"the database {text!r} names no file; give a path such as tuning.db")
    return Path(name).expanduser()


def require_file(path: Path) -> None:
    """Refuse a path where there is no file to open, or where SQLite would wait for ever beside it.

    Raises TilewrightError.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError as error:
        raise TilewrightError(
            f"there is no database {path}; run `tune` to make one, or name another with --db"
        ) from error
    except OSError as error:
        raise TilewrightError(
            f"the database {path} cannot be opened: {error.strerror}; check its permissions"
        ) from error
    if not is_file:
        raise TilewrightError(f"the database {path} is not a file; name a file")
    real = path.resolve()
    for beside in (real.with_name(real.name + suffix) for suffix in SIDECARS):
        if beside.exists() and not beside.is_file():
            raise TilewrightError(f"{beside}, beside the database, is not a file; remove it")
