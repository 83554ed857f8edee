"""Whose files this process believes: owner and mode, asked before anything that a file holds can be executed.

Databases, packs, built kernels and what lies between them are programs. Whoever can write one, or put another one in
its place, runs code as this user. So the file, its folder and every folder above them are looked at.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tilewright.errors import TilewrightError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UntrustedFile(TilewrightError):  # noqa: N818  (named for what the user reads)
    """Somebody else could have changed this file, so what it holds must not be executed."""


@dataclass(frozen=True)
class Stranger:
    """Who else has a say over a file."""

    path: Path
    """The file itself, or the folder through which they do."""
    how: str
    """``belongs to another user (uid 1001)`` or ``can be written by others (mode 0666)``."""
    owns: bool


def find_stranger(path: Path) -> Stranger | None:
    """Who else can change the file or folder ``path``, or put another in its place; None: nobody.

    A file and its folder must belong to this user or root, and neither their group nor others may write them. A
    sticky folder is no exception: anyone can put a write-ahead log beside a database in it. Of the folders above,
    sticky ones are (nobody renames there what is not theirs), and so are those that only root's group or this
    user's own can write. ``path`` is taken as it is; resolve links before.

    Raises:
        OSError: when it cannot be examined.

    """
    status = path.lstat()
    if found := stranger_at(path, status):
        return found
    above = list(path.parents)
    if not stat.S_ISDIR(status.st_mode):
        folder = above.pop(0)
        if found := stranger_at(folder, folder.lstat()):
            return found
    return next((found for folder in above if (found := _stranger_above(folder))), None)


def stranger_at(path: Path, status: os.stat_result) -> Stranger | None:
    """Who else can change ``path`` itself, as its ``status`` says."""
    if status.st_uid not in (0, os.geteuid()):
        return Stranger(path, f"belongs to another user (uid {status.st_uid})", owns=True)
    if status.st_mode & _OTHERS:
        return _writable(path, status)
    return None


def _stranger_above(folder: Path) -> Stranger | None:
    status = folder.lstat()
    # Who owns the root of all files can do what root can; in a container that need not be number 0.
    if status.st_uid not in (0, os.geteuid(), Path("/").lstat().st_uid):
        return Stranger(folder, f"belongs to another user (uid {status.st_uid})", owns=True)
    own_group = status.st_gid in (0, os.geteuid())
    others = stat.S_IWOTH if own_group else _OTHERS
    if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
        return _writable(folder, status)
    return None


def _writable(path: Path, status: os.stat_result) -> Stranger:
    return Stranger(path, f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})", owns=False)


def make_private_folder(path: Path) -> None:
    """Make ``path`` and what is missing above it, all for this user alone, whatever the umask is.

    Raises:
        OSError: when it cannot be made.

    """
    if path.is_dir():
        return
    if not path.parent.exists():
        make_private_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
