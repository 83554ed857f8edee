"""Builds in the cache: what others wrote there is never taken, and what is damaged is built again."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder
from tilewright.codegen.backends.kept import KeptBuilds
from tilewright.codegen.hardware.archs import CPU_ARCHS
from tilewright.errors import TilewrightError
from tilewright.tuner.commands import doctor

AVX2 = CPU_ARCHS["x86_64_avx2"]
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture
def kept(tmp_path: Path) -> KeptBuilds:
    return KeptBuilds(tmp_path / "cache", "builds")


def keep(kept: KeptBuilds, name: str, content: bytes = b"honest", *, folder: bool = False) -> Path:
    draft = kept.folder / f"build-{name}"
    if folder:
        draft.mkdir()
        for file in ("0.cubin", "0.json"):
            (draft / file).write_bytes(content)
    else:
        draft.write_bytes(content)
    kept.keep(draft, name)
    return kept.folder / name


def manifest(path: Path) -> Path:
    return path.parent.parent / "manifests" / f"{path.name}.json"


def changed(path: Path) -> None:
    path.write_bytes(b"hostil")


def truncated(path: Path) -> None:
    os.truncate(path, 3)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def writable(path: Path) -> None:
    path.chmod(0o666)


def of_another_user(path: Path) -> None:
    os.chown(path, 12345, -1)


def a_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_a_manifest(path: Path) -> None:
    manifest(path).unlink()


def with_a_manifest(text: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        manifest(path).write_text(text)

    spoil.__name__ = f"with the manifest {text[:20]}"
    return spoil


def with_anothers_manifest(path: Path) -> None:
    """As if others could write: their build, and a manifest that fits it."""
    path.write_bytes(b"hostile")
    path.chmod(0o600)
    other = path.with_name("other.so")
    shutil.copy(manifest(other), manifest(path))
    shutil.copy(other, path)


SPOILED = [
    changed,
    truncated,
    emptied,
    writable,
    pytest.param(of_another_user, marks=ROOT),
    a_link,
    a_pipe,
    a_folder,
    without_a_manifest,
    with_anothers_manifest,
    *map(
        with_a_manifest,
        (
            "",
            "no JSON",
            "[]",
            "[" * 100_000,
            '{"build": "a.so"}',
            '{"build": "a.so", "files": {}}',
            '{"build": "a.so", "files": {"": 1}}',
            '{"build": "a.so", "files": []}',
            '{"build": "b.so", "files": {"": ""}}',
        ),
    ),
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_does_not_fit_is_not_taken_and_is_replaced(kept: KeptBuilds, spoil: Callable[[Path], None]) -> None:
    keep(kept, "other.so", b"another build")
    path = keep(kept, "a.so")
    assert kept.holds("a.so")
    assert kept.unfit() == []
    spoil(path)
    assert not kept.holds("a.so")
    assert "a.so" in kept.unfit()
    keep(kept, "a.so")
    assert kept.holds("a.so")
    assert path.read_bytes() == b"honest"


def one_more_file(path: Path) -> None:
    (path / "1.cubin").write_bytes(b"")


def one_file_less(path: Path) -> None:
    (path / "0.json").unlink()


def one_file_changed(path: Path) -> None:
    (path / "0.json").write_bytes(b"{}")


def one_file_writable(path: Path) -> None:
    (path / "0.json").chmod(0o620)


def a_folder_inside(path: Path) -> None:
    (path / "more").mkdir()


def a_writable_folder(path: Path) -> None:
    path.chmod(0o777)


@pytest.mark.parametrize(
    "spoil", [one_more_file, one_file_less, one_file_changed, one_file_writable, a_folder_inside, a_writable_folder]
)
def test_a_folder_of_files_has_to_fit_as_a_whole(kept: KeptBuilds, spoil: Callable[[Path], None]) -> None:
    path = keep(kept, "a", folder=True)
    assert kept.holds("a")
    spoil(path)
    assert not kept.holds("a")
    keep(kept, "a", folder=True)
    assert kept.holds("a")
    assert sorted(file.name for file in path.iterdir()) == ["0.cubin", "0.json"]
    assert [each.name for each in kept.folder.iterdir()] == ["a"]


@pytest.mark.parametrize("folder", [False, True])
def test_processes_that_keep_one_build_at_once_agree(kept: KeptBuilds, tmp_path: Path, *, folder: bool) -> None:
    spoiled = keep(kept, "a", folder=folder)
    (spoiled / "0.json" if folder else spoiled).write_bytes(b"damaged")

    def again(number: int) -> bool:
        mine = KeptBuilds(tmp_path / "cache", "builds")
        draft = mine.folder / f"build-{number}"
        if folder:
            draft.mkdir()
            for file in ("0.cubin", "0.json"):
                (draft / file).write_bytes(b"honest")
        else:
            draft.write_bytes(b"honest")
        mine.keep(draft, "a")
        return mine.holds("a")

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(again, range(32)))


def test_a_cache_made_under_any_umask_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        kept = KeptBuilds(tmp_path / "some" / "where" / "cache", "builds")
        keep(kept, "a.so")
        keep(kept, "b", folder=True)
    finally:
        os.umask(before)
    made = [*(tmp_path / "some").rglob("*"), tmp_path / "some"]
    assert len(made) == 12
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("part", ["cache/builds", "cache/manifests", "cache", "."])
def test_a_folder_that_others_can_write_keeps_no_builds(tmp_path: Path, part: str) -> None:
    KeptBuilds(tmp_path / "cache", "builds")
    (tmp_path / part).chmod(0o777)
    with pytest.raises(TilewrightError, match=r"can be written by others \(mode 0777\).*set \$TILEWRIGHT_CACHE"):
        KeptBuilds(tmp_path / "cache", "builds")
    (tmp_path / part).chmod(0o700)


@ROOT
def test_a_folder_of_another_user_keeps_no_builds(tmp_path: Path) -> None:
    KeptBuilds(tmp_path / "cache", "builds")
    os.chown(tmp_path / "cache" / "builds", 12345, -1)
    with pytest.raises(TilewrightError, match=r"belongs to another user \(uid 12345\)"):
        KeptBuilds(tmp_path / "cache", "builds")


def test_a_damaged_object_is_compiled_again(tmp_path: Path) -> None:
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\nfor word; do case $word in *.so) echo built > "$word";; esac; done\n')
    script.chmod(0o755)
    builder = CppBuilder(AVX2, Compiler(str(script), "Scripted 1.0"), tmp_path / "cache")
    first = builder.build("a")
    assert first.path is not None
    first.path.write_text("hostile")
    again = builder.build("a")
    assert again.path == first.path
    assert first.path.read_text() == "built\n"
    stored = json.loads(manifest(first.path).read_text())
    assert stored["build"] == first.path.name


def test_doctor_counts_builds_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptBuilds(tmp_path / "cache", "builds")
    path = keep(kept, "a.so")
    keep(KeptBuilds(tmp_path / "cache", "builds-triton"), "b", folder=True)
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    assert doctor._cache() == ("ok", f"{tmp_path}/cache: 2 builds, each as it was put there", None)
    path.write_bytes(b"hostile")
    found = doctor._cache()
    assert (found.status, "1 of 2 builds are not what was put there" in found.message) == ("warn", True)
    kept.folder.chmod(0o777)
    with pytest.raises(TilewrightError, match="builds can be written by others"):
        doctor._cache()
