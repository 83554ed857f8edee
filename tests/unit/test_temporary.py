"""Temporary folders: gone after use, and after the next run where their process was killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tilewright.temporary import remove_abandoned, temporary_folder

PREFIX = "made-"
HOLD = """
import sys
from pathlib import Path
from tilewright.temporary import temporary_folder
with temporary_folder(sys.argv[2], Path(sys.argv[1])) as folder:
    (folder / "kernel.so").write_text("")
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(where: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process with a temporary folder."""
    command = [sys.executable, "-c", HOLD, str(where), PREFIX]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_folder_is_ours_alone_and_goes_with_its_content(tmp_path: Path) -> None:
    with temporary_folder(PREFIX, tmp_path) as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "sub").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    with holding(tmp_path) as (killed, left), holding(tmp_path) as (_, held):
        remove_abandoned(tmp_path, PREFIX)
        assert left.exists()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with temporary_folder(PREFIX, tmp_path) as mine:
            assert sorted(tmp_path.iterdir()) == sorted([held, mine])
        assert (held / "kernel.so").exists()


def test_only_folders_that_are_surely_ours_are_removed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    where = tmp_path / "where"
    where.mkdir()
    (where / f"{PREFIX}link").symlink_to(elsewhere)
    (where / f"{PREFIX}file").touch(0o700)
    (where / f"{PREFIX}shared").mkdir(mode=0o755)
    (where / "another").mkdir(mode=0o700)
    (where / f"{PREFIX}begun.new").mkdir(mode=0o700)  # its process is about to lock it
    before = sorted(where.iterdir())
    remove_abandoned(where, PREFIX)
    assert sorted(where.iterdir()) == before
    long_ago = time.time() - 3600
    os.utime(where / f"{PREFIX}begun.new", (long_ago, long_ago))
    remove_abandoned(where, PREFIX)
    assert sorted(where.iterdir()) == [path for path in before if path.suffix != ".new"]
    assert elsewhere.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_somebody_elses_folders_stay(tmp_path: Path) -> None:
    theirs = tmp_path / f"{PREFIX}theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 65534, 65534)
    remove_abandoned(tmp_path, PREFIX)
    assert theirs.exists()


def test_a_place_that_cannot_be_listed_is_no_error(tmp_path: Path) -> None:
    remove_abandoned(tmp_path / "absent", PREFIX)
