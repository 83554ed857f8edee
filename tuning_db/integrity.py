"""What makes stored bytes trustworthy: checksums, and files that nobody else can write."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from tilewright.errors import TilewrightError

SIDECARS = ("-wal", "-shm", "-journal")
"""Ends of the names of the files that SQLite keeps beside a database."""


class DamagedDatabase(TilewrightError):  # noqa: N818  (named for what the user reads)
    """The database's file was truncated, overwritten or has flipped bits."""


class DamagedArtifact(DamagedDatabase):
    """A stored object's bytes do not match its checksum."""


class UntrustedFile(TilewrightError):  # noqa: N818
    """Somebody else could have changed this file, so what it holds must not be executed."""


def sha256_hex(data: bytes) -> str:
    """Return the sha256 of ``data`` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def seal(document: dict[str, Any]) -> str:
    """Return the sha256 of a JSON document, independent of the order of its keys and of tuple against list.

    Raises ValueError for numbers that are not finite.
    """
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_hex(canonical.encode())


def verified(checksum: str, data: bytes) -> bytes:
    """Return ``data`` if ``checksum`` is its sha256; raises DamagedArtifact otherwise."""
    found = sha256_hex(data)
    if found != checksum:
        raise DamagedArtifact(
            f"the artifact {checksum[:16]} is damaged (its bytes have checksum {found[:16]}); tune again to replace it"
        )
    return data


def check_private(path: Path) -> None:
    """Refuse a file that others could have written: it, its directory, or what SQLite keeps beside it.

    All must belong to this user or root and must not be writable by their group or by others. A sticky directory is
    no exception: anyone can put a write-ahead log beside a database in it. Symbolic links are followed first.
    Raises UntrustedFile; OSError where ``path`` cannot be examined.
    """
    real = path.resolve()
    for part in (real, real.parent):
        _check_owner_and_mode(part, part.stat())
    for suffix in SIDECARS:
        beside = real.with_name(real.name + suffix)
        try:
            status = beside.stat()
        except FileNotFoundError:  # the usual case; they also come and go while a writer works
            continue
        _check_owner_and_mode(beside, status)


def _check_owner_and_mode(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise UntrustedFile(
            f"{path} belongs to another user (uid {status.st_uid}), so kernels in it are not run; "
            f"copy the database into a directory of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UntrustedFile(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}), so kernels in it are not run; "
            f"run `chmod go-w {path}` or move the database into a directory of your own"
        )
