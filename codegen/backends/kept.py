"""Where builds are kept, and whether one that lies there is still what was put there.

A build is loaded into processes of this user. So nobody else may be able to write to the folders that it lies in, and
its bytes have to be those that a manifest names. What does not fit is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tilewright import disks
from tilewright.codegen.backends.building import DRAFT
from tilewright.directories import user_cache_directory
from tilewright.errors import TilewrightError
from tilewright.temporary import temporary_folder
from tilewright.trust import UntrustedFile, find_stranger, make_private_folder, stranger_at

BUILDS = "builds"
"""How the names of folders of builds begin."""
MANIFESTS = "manifests"
"""Folder beside those of builds: a file for each build, with its name and the sha256 of every file of it."""
_LOCK = "lock"
_LARGEST_MANIFEST = 1 << 20


class KeptBuilds:
    """Builds under their names, each a file or a folder of files. Safe to share between threads and processes.

    Args:
        directory: that holds all such folders; None: the user's cache.
        name: of the folder.

    Raises:
        UntrustedFile: when others could put builds of theirs there.
        TilewrightError: when the folder cannot be made.

    """

    def __init__(self, directory: Path | None, name: str) -> None:
        cache = Path(os.path.realpath(directory or user_cache_directory()))
        self.folder = cache / name
        self._manifests = cache / MANIFESTS
        for path in (self.folder, self._manifests):
            try:
                make_private_folder(path)
                found = find_stranger(path)
            except OSError as error:
                raise TilewrightError(
                    f"cannot keep built kernels in {path} ({disks.reason(error)}); "
                    "set $TILEWRIGHT_CACHE to a directory that can be written"
                ) from error
            if found:
                raise UntrustedFile(
                    f"cannot keep built kernels in {path}, for {found.path} {found.how}, and others could put theirs "
                    "there; set $TILEWRIGHT_CACHE to a directory of your own"
                )

    def holds(self, name: str) -> bool:
        """Whether the build ``name`` lies there as it was put there."""
        try:
            return self._manifest(name) == _hashes(self.folder / name)
        except (OSError, ValueError):
            return False

    def keep(self, made: Path, name: str) -> None:
        """Give ``made``, a file or a folder, its name; another process may have been first with the same content.

        Raises:
            OSError: when that cannot be written.

        """
        for path in (made, *(made.iterdir() if made.is_dir() else ())):
            path.chmod(0o700 if path.is_dir() else 0o600)
            _write_back(path)
        target = self.folder / name
        with self._locked():
            if self.holds(name):
                return
            if os.path.lexists(target):  # it does not fit
                with temporary_folder(DRAFT, self.folder) as aside:
                    target.rename(aside / name)
            hashes = _hashes(made)
            made.rename(target)
            self._put_manifest(name, hashes)

    def unfit(self) -> list[str]:
        """Names of what lies there and is not what was put there; it is built again when it is needed."""
        names = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(DRAFT))
        return [name for name in names if not self.holds(name)]

    def __len__(self) -> int:
        return sum(not path.name.startswith(DRAFT) for path in self.folder.iterdir())

    def _manifest(self, name: str) -> dict[str, str]:
        text = _own_bytes(self._manifests / f"{name}.json", _LARGEST_MANIFEST)
        try:
            manifest = json.loads(text)
        except RecursionError as error:
            raise ValueError("a manifest that is nested too deeply") from error
        if not isinstance(manifest, dict) or manifest.get("build") != name:
            raise ValueError("the manifest of another build")
        files = manifest.get("files")
        if not isinstance(files, dict) or not files:
            raise ValueError("a manifest without files")
        return files

    def _put_manifest(self, name: str, hashes: dict[str, str]) -> None:
        with temporary_folder(DRAFT, self.folder) as aside:
            draft = aside / f"{name}.json"
            with draft.open("w") as file:
                json.dump({"build": name, "files": hashes}, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            draft.chmod(0o600)
            draft.replace(self._manifests / draft.name)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._manifests / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            # On a file system without locks two processes may mend one build, at worst one after the other.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _hashes(path: Path) -> dict[str, str]:
    """The sha256 of every file of a build, by its name; a build that is one file has no name in it.

    Raises:
        OSError: when it is not there.
        ValueError: when others could have written it, or it holds something else than files.

    """
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return {"": _sha256(path)}
    if stranger_at(path, status):
        raise ValueError(f"{path} is not this user's alone")
    return {file.name: _sha256(file) for file in path.iterdir()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(_own_bytes(path)).hexdigest()


def _own_bytes(path: Path, most: int = -1) -> bytes:
    """Content of a file that nobody else can write, up to ``most`` bytes."""
    # Not to wait for whoever writes to a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or stranger_at(path, status):
            raise ValueError(f"{path} is no file of this user's alone")
        return file.read(most)


def _write_back(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
