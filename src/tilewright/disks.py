"""What a failing disk means to a user: one sentence for each error of the system, and for what other programs print."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilewright.errors import TilewrightError
from tilewright.plain_text import plain

FULL = "the disk is full; free some space"

_MEANINGS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: "the quota of the disk is used up; free some space",
    errno.EFBIG: "a file may not grow so large (ulimit -f, or the file system's own limit); raise that",
    errno.EROFS: "the disk is mounted read-only; use another",
    errno.EIO: "the disk failed; check its health",
}
_PRINTED = {
    **{os.strerror(code): said for code, said in _MEANINGS.items()},
    "File size limit exceeded": _MEANINGS[errno.EFBIG],  # of the signal
}
_REFUSED = {
    errno.EACCES: "this user may not do that; check the owners and modes of it and of the folders above",
    errno.EPERM: "this user may not do that; check its owner and flags",
    errno.ENOTDIR: "something on the way there is not a folder; check the path",
    errno.ELOOP: "its links lead in a circle; check the path",
    errno.ENAMETOOLONG: "that name is too long; give a shorter one",
}
"""What is wrong with a path, or with who asks; never what a compiler's output is searched for."""
_NO_TEMPORARY_FOLDER = "No usable temporary directory found"
"""What :mod:`tempfile` says where every folder it knows is full or cannot be written."""
_LEAST_BYTES = 64 << 10
"""Where a disk has less, a failure to make or to extend a file is taken for what that is."""

TEMPORARY = "the folder of temporary files ($TMPDIR)"


def meaning(error: OSError) -> str | None:
    """What ``error`` says of a disk or a path, and what to do; None for errors of another kind."""
    if error.errno == errno.ENOENT and _NO_TEMPORARY_FOLDER in str(error):
        return (
            "no folder for temporary files can be written; free some space, or set $TMPDIR to a folder on another disk"
        )
    return (_MEANINGS | _REFUSED).get(error.errno or 0)


def sentence(error: OSError) -> str:
    """What ``error`` says as a sentence that names the file, where the system does."""
    return f"{plain(str(error.filename or 'the output'))} cannot be read or written: {reason(error)}"


def reason(error: OSError) -> str:
    """What ``error`` says, in a part of a sentence: of a disk with what to do."""
    return meaning(error) or error.strerror or str(error) or type(error).__name__


def printed_meaning(text: str) -> str | None:
    """:func:`meaning` of the first error of a disk that another program has named in what it printed."""
    found = [(text.find(printed), said) for printed, said in _PRINTED.items() if printed in text]
    return min(found)[1] if found else None


def is_full(folder: Path) -> bool:
    """Whether the disk that holds ``folder`` has no room for files or for another one."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    # File systems without a fixed number of files say that they have none at all.
    return status.f_bavail * status.f_frsize < _LEAST_BYTES or (status.f_files > 0 and status.f_favail == 0)


@contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """Turn a failure of the disk, met while files are written in ``place``, into a sentence.

    Raises:
        TilewrightError: names the place. Errors of another kind pass through.

    """
    try:
        yield
    except OSError as error:
        if (said := meaning(error)) is None:
            raise
        raise TilewrightError(f"{place} cannot be written: {said}") from error
