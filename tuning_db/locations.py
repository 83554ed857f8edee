"""Where the database is: a path, a SQLite URL, or the URL of another server."""

import os
import re
import stat
import sys
from pathlib import Path
from urllib.parse import unquote

from tilewright.errors import TilewrightError

ENVIRONMENT_VARIABLE = "TILEWRIGHT_DB"

_SQLITE_URL = re.compile(r"sqlite(?:\+pysqlite)?://(?P<rest>.*)", re.DOTALL)


def home_directory() -> Path:
    """Return the user's home. Raises TilewrightError for a user without one, as containers may have."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise TilewrightError(
            f"this user has no home directory; set $HOME, or both ${ENVIRONMENT_VARIABLE} (a file) and "
            "$TILEWRIGHT_CACHE (a directory)"
        )
    return home


def user_data_path() -> Path:
    """Return the path of the database in the platform's directory for a user's data.

    Raises TilewrightError where that is in the user's home and there is none.
    """
    if sys.platform == "darwin":
        base = home_directory() / "Library" / "Application Support"
    else:
        configured = os.environ.get("XDG_DATA_HOME", "")
        # The XDG specification says to ignore a relative path.
        base = Path(configured) if Path(configured).is_absolute() else home_directory() / ".local" / "share"
    return base / "tilewright" / "tuning.db"


def default_url() -> str:
    """Return what is used where no database is named: ``$TILEWRIGHT_DB`` (a path or a URL), else the user's own."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or str(user_data_path())


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
        name = unquote(url["rest"].removeprefix("/"))
        if "?" in url["rest"]:
            raise TilewrightError(f"the database {text!r} carries options that do nothing; give the path alone")
    if name in ("", ":memory:"):
        raise TilewrightError(f"the database {text!r} names no file; give a path such as tuning.db")
    return Path(name).expanduser()


def require_file(path: Path) -> None:
    """Refuse a path where there is no file to open. Raises TilewrightError."""
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
