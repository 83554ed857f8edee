"""Where this user's data and caches are, by the rules of the platform."""

import os
from collections.abc import Callable
from pathlib import Path

from tilewright.errors import TilewrightError

DATABASE_VARIABLE = "TILEWRIGHT_DB"
CACHE_VARIABLE = "TILEWRIGHT_CACHE"

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
