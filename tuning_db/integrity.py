"""What makes stored bytes trustworthy: checksums, and files that nobody else can write."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tilewright.errors import TilewrightError
from tilewright.trust import Stranger, UntrustedFile, find_stranger, stranger_at

__all__ = [
    "SIDECARS",
    "DamagedArtifact",
    "DamagedDatabase",
    "UntrustedFile",
    "check_private",
    "check_private_folder",
    "seal",
    "sha256_hex",
    "verified",
]

SIDECARS = ("-wal", "-shm", "-journal")
"""Ends of the names of the files that SQLite keeps beside a database."""


class DamagedDatabase(TilewrightError):  # noqa: N818  (named for what the user reads)
    """The database's file was truncated, overwritten or has flipped bits."""


class DamagedArtifact(DamagedDatabase):
    """A stored object's bytes do not match its checksum."""


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


def check_private(path: Path) -> Path:
    """Refuse a database that others could have written: it, a folder that it lies in, or what SQLite keeps beside it.

    Returns the file's real path, which is what has to be opened: a link could name another one by then.
    Raises UntrustedFile; OSError where ``path`` cannot be examined.
    """
    real = Path(os.path.realpath(path))
    if found := find_stranger(real):
        raise _untrusted(real, found)
    for suffix in SIDECARS:
        beside = real.with_name(real.name + suffix)
        try:
            status = beside.stat()
        except FileNotFoundError:  # the usual case; they also come and go while a writer works
            continue
        if found := stranger_at(beside, status):
            raise _untrusted(real, found)
    return real


def check_private_folder(folder: Path) -> None:
    """Refuse to make a database where others could replace it. Raises UntrustedFile, OSError as above."""
    real = Path(os.path.realpath(folder))
    if found := find_stranger(real):
        raise UntrustedFile(
            f"{found.path} {found.how}, and a database is code: others could put theirs into one that lies there; "
            "name a file in a directory of your own"
        )


def _untrusted(path: Path, found: Stranger) -> UntrustedFile:
    """A copy of an untrusted file is not safer than the file, so that no advice here is to copy it."""
    where = "" if found.path == path else f" of {path}"
    begin = f"{found.path} {found.how}, so nothing{where} is read or run: a database is code"
    if found.owns:
        return UntrustedFile(
            f"{begin}, and a copy of it is the same code; if you would run that user's programs, make it yours by "
            "`chown`, else tune anew or ask for a signed pack"
        )
    return UntrustedFile(
        f"{begin}, and others may have put theirs into it; if you know that nobody did, run "
        f"`chmod go-w {found.path}`, else tune anew"
    )
