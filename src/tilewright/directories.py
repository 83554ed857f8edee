"""Where this user's data and caches are, by the rules of the platform."""

import os
from collections.abc import Callable
from pathlib import Path

from tilewright.errors import TilewrightError

DATABASE_VARIABLE = "TILEWRIGHT_DB"
CACHE_VARIABLE = "TILEWRIGHT_CACHE"
TEMPORARY_VARIABLE = "TMPDIR"
KEY_VARIABLE = "TILEWRIGHT_VERIFY_KEY"

_NAME = "tilewright"


def user_data_directory() -> Path:
    """Return the directory for a user's own data.

    Raises TilewrightError where that is in the user's home and there is none, as in some containers.
    """
    from platformdirs import user_data_path  # here, so that importing the runtime loads no library for it

    return _at_home(lambda: user_data_path(_NAME, appauthor=False))


def user_cache_directory() -> Path:
    """Return the directory for what can be made again: ``$TILEWRIGHT_CACHE``, else the platform's.

    Raises TilewrightError where that is in the user's home and there is none.
    """
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured).expanduser()
    from platformdirs import user_cache_path

    return _at_home(lambda: user_cache_path(_NAME, appauthor=False))


def _at_home(find: Callable[[], Path]) -> Path:
    try:
        path = find()
    except RuntimeError:
        path = Path()
    if not path.is_absolute():
        raise TilewrightError(
            f"this user has no home directory; set $HOME, or both ${DATABASE_VARIABLE} (a file) and "
            f"${CACHE_VARIABLE} (a directory)"
        )
    return path


def forbids_execution(folder: Path) -> bool:
    """Return whether nothing in ``folder``, or what will be made there, can be executed: it is mounted noexec.

    Raises OSError when it cannot be examined.
    """
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    return bool(os.statvfs(existing).f_flag & os.ST_NOEXEC)


def require_execution(folder: Path, variable: str) -> None:
    """Refuse a folder from which nothing can be executed, naming the variable that moves it.

    Raises TilewrightError.
    """
    try:
        forbidden = forbids_execution(folder)
    except OSError as error:
        raise TilewrightError(
            f"{folder} cannot be looked at ({error.strerror}); set ${variable} to a folder of your own"
        ) from error
    if forbidden:
        raise TilewrightError(
            f"nothing can be executed from {folder}, which is mounted noexec; set ${variable} to a folder on another "
            "file system"
        )
