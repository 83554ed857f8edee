"""Folders for a while: gone when they were used, and where their process was killed, at the next run.

A folder's owner holds a lock on it (``flock``), which the system takes back however that process ends. So a folder that
can be locked has lost its owner, in whatever container that lived; where a shared disk cannot lock, nothing is removed.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilewright.errors import TilewrightError

_PREFIX = "tilewright-of-"
_UNLOCKED = ".new"
"""How the names of folders end that their process is about to lock."""
_UNLOCKED_S = 600.0
"""After which no process is about to lock one any more."""
_tidied: set[tuple[Path, str]] = set()


@contextmanager
def temporary_folder(prefix: str = _PREFIX, inside: Path | None = None) -> Iterator[Path]:
    """Make a folder of this user's alone, and remove it at the end; those that killed processes left go first.

    Args:
        prefix: how its name begins, which no other kind of file or folder there may share.
        inside: an existing folder; None: the one for temporary files.

    Raises:
        TilewrightError: when the system has no folder for temporary files.
        OSError: when it cannot be made.

    """
    where = inside or temporary_files()
    if (where, prefix) not in _tidied:  # once is enough for a process
        _tidied.add((where, prefix))
        remove_abandoned(where, prefix)
    folder, lock = _locked_folder(where, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def temporary_files() -> Path:
    """The folder for temporary files: ``$TMPDIR``, else the system's.

    Raises:
        TilewrightError: when none can be written.

    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise TilewrightError(
            "no folder for temporary files can be written; free some space, or set $TMPDIR to one that can"
        ) from error


def remove_abandoned(where: Path, prefix: str = _PREFIX) -> None:
    """Remove this user's folders in ``where`` whose names begin with ``prefix`` and whose processes are dead."""
    with contextlib.suppress(OSError):  # what cannot be listed is no hindrance to who was asked for something else
        with os.scandir(where) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(prefix)]
        for name in names:
            _remove_if_abandoned(where / name)


def _locked_folder(where: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    name = f"{prefix}{secrets.token_hex(8)}"
    draft = where / f"{name}{_UNLOCKED}"
    draft.mkdir(mode=0o700)
    lock = None
    try:
        lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a disk that cannot lock keeps what killed processes leave
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Only now under the name that others look for: they would lock it first.
        draft.rename(where / name)
    except BaseException:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return where / name, lock


def _remove_if_abandoned(folder: Path) -> None:
    # It may be gone by now, be no folder or somebody else's, have an owner, or lie on a disk that cannot lock.
    with contextlib.suppress(OSError), _opened(folder) as lock:
        status = os.fstat(lock)
        is_ours = status.st_uid == os.geteuid() and status.st_mode & 0o777 == 0o700
        is_settled = not folder.name.endswith(_UNLOCKED) or time.time() - status.st_mtime > _UNLOCKED_S
        if is_ours and is_settled:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
