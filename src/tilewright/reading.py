"""Files that users name: read whole, if they are files at all and no larger than what is read from them can be."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

_OPENING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Opened so, a pipe that nobody writes to is not waited for."""


class UnreadableFile(OSError):  # noqa: N818  (named for what the user reads)
    """What a name leads to is no file, or holds too much; ``strerror`` says which."""

    def __init__(self, said: str, path: Path) -> None:
        super().__init__(0, said, str(path))


def open_file(path: Path, most_bytes: int) -> BinaryIO:
    """Open a regular file of up to ``most_bytes`` bytes for reading.

    Raises:
        UnreadableFile: for a pipe, a device, a folder, and a larger file.
        OSError: when it cannot be opened.

    """
    descriptor = os.open(path, _OPENING)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(0, "Is a directory", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile("it is a pipe or a device, and no file", path)
        if status.st_size > most_bytes:
            raise UnreadableFile(f"it has {status.st_size >> 20} MiB, and at most {most_bytes >> 20} are read", path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: Path, most_bytes: int) -> bytes:
    """Read a regular file of up to ``most_bytes`` bytes; see :func:`open_file`."""
    with open_file(path, most_bytes) as file:
        # Those of /proc say that they have no bytes, and have many.
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise UnreadableFile(f"it holds more than {most_bytes >> 20} MiB", path)
    return data
