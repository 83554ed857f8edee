"""Shared objects loaded from memory: what was checked is what runs, whatever somebody does beside it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from tilewright.codegen.recipe.model import ABI_VERSION
from tilewright.runtime.launchers import host_so
from tilewright.runtime.launchers.base import KernelRefused
from tilewright.runtime.launchers.memory_file import _sealed_file, load_from_memory
from tilewright.tuning_db.integrity import DamagedArtifact

COMPILER = shutil.which("cc") or shutil.which("clang") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def shared_object(folder: Path, code: str) -> bytes:
    assert COMPILER is not None
    (folder / "code.c").write_text(code)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", folder / "code.c", "-o", folder / "code.so"], check=True)
    return (folder / "code.so").read_bytes()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    code = f"int tilewright_abi_version(void) {{ return {ABI_VERSION}; }}\nint answer(void) {{ return 42; }}\n"
    return shared_object(tmp_path_factory.mktemp("honest"), code)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Makes the file ``$CANARY`` when it is loaded."""
    code = """
        #include <fcntl.h>
        #include <stdlib.h>
        __attribute__((constructor)) static void run(void) { creat(getenv("CANARY"), 0600); }
    """
    return shared_object(tmp_path_factory.mktemp("hostile"), code)


def variant(data: bytes, number: int) -> bytes:
    """The same code in other bytes, that were never loaded."""
    return data + number.to_bytes(8, "little") + os.urandom(8)


def answer_of(library: ctypes.CDLL) -> int:
    return int(library.answer())


def test_every_library_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    made = [shared_object(tmp_path, f"int answer(void) {{ return {number}; }}") for number in range(5)]
    before = len([*Path("/proc/self/fd").iterdir()])
    libraries = [load_from_memory(f"library-{number}", data) for number, data in enumerate(made)]
    assert [answer_of(library) for library in libraries] == list(range(5))
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    assert "memfd:library-3" in Path("/proc/self/maps").read_text()


def test_nobody_writes_to_a_sealed_file() -> None:
    descriptor = _sealed_file("sealed", b"checked")
    try:
        for change in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 1),
            lambda: os.ftruncate(descriptor, 100),
        ):
            with pytest.raises(PermissionError):
                change()
        assert os.pread(descriptor, 100, 0) == b"checked"
    finally:
        os.close(descriptor)


def test_bytes_of_another_checksum_are_not_loaded(honest: bytes) -> None:
    with pytest.raises(DamagedArtifact):
        host_so.load_artifact("0" * 64, lambda: honest)


def test_bytes_that_are_no_shared_object_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    data = b"\x7fELF and no more"
    with pytest.raises(KernelRefused, match="cannot be loaded: it is no 64-bit little-endian ELF file; tune again"):
        host_so.load_artifact(hashlib.sha256(data).hexdigest(), lambda: data)


@pytest.mark.parametrize("where", ["memory", "folder", "shared folder"])
def test_a_file_swapped_between_the_check_and_the_loading_is_never_run(
    where: str, honest: bytes, hostile: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread puts its own file under every name in the cache, and the folder where it can, as fast as it can."""
    above = tmp_path / "above"
    above.mkdir()
    cache = above / "cache"
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(cache))
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    if where != "memory":
        monkeypatch.setattr(host_so, "load_from_memory", lambda *_: (_ for _ in ()).throw(OSError("not from memory")))
    if where == "shared folder":
        above.chmod(0o777)
    swapped = tmp_path / "swapped"
    done = threading.Event()

    def swap() -> None:
        # What others can do: nothing in folders that are this user's alone.
        while not done.is_set():
            if above.stat().st_mode & 0o002:
                for path in (cache / "artifacts").glob("*.so"):
                    swapped.write_bytes(hostile)
                    swapped.replace(path)

    attacker = threading.Thread(target=swap)
    attacker.start()
    served = 0
    try:
        for number in range(20):
            data = variant(honest, number)
            try:
                loaded = host_so.load_artifact(hashlib.sha256(data).hexdigest(), lambda data=data: data)
            except (KernelRefused, host_so.UntrustedFile, DamagedArtifact):
                continue
            served += 1
            assert answer_of(loaded.library) == 42
    finally:
        done.set()
        attacker.join()
    assert not (tmp_path / "canary").exists()
    assert served == (0 if where == "shared folder" else 20)
