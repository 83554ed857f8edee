"""Folders that cannot be executed from, and those of other users: every command names them in one sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.directories import forbids_execution, require_execution
from tilewright.errors import TilewrightError

UNSHARE, SETPRIV = shutil.which("unshare"), shutil.which("setpriv")
NOEXEC = """
import sys
from tilewright.codegen.hardware.archs import native_arch
from tilewright.errors import TilewrightError
from tilewright.tuner.cli import main
from tilewright.tuner.report.roofline import measure_roofline
code = main(["doctor", "--json"])
try:
    measure_roofline(1)
except TilewrightError as error:
    print(error, file=sys.stderr)
main(["--arch", "native", "--op", "gating", "--problem", "experts=8,top_k=2", "--tokens", "4", "--trials", "1"])
sys.exit(code)
"""
PERMISSIONS = """
import sys
from tilewright.tuner.cli import main
theirs = sys.argv[1]
tune = ["--arch", "native", "--op", "gating", "--trials", "1", "--tokens", "4"]
for words in (
    ["doctor", "--json", "--db", f"{theirs}/t.db"],
    ["show", "--db", f"{theirs}/t.db"],
    ["pack", f"{theirs}/x.pack"],
    ["export", f"{theirs}/x.log"],
    [*tune, "--model", f"{theirs}/config.json"],
    [*tune, "--problem", "experts=8,top_k=2", "--db", f"{theirs}/t.db"],
):
    print(main(words), *words[:1], file=sys.stderr)
"""


def test_a_mount_that_forbids_execution_is_found_for_what_does_not_exist_yet(tmp_path: Path) -> None:
    proc = Path("/proc")
    if not os.statvfs(proc).f_flag & os.ST_NOEXEC:
        pytest.skip("/proc is not mounted noexec here")
    assert forbids_execution(proc / "absent" / "cache")
    with pytest.raises(TilewrightError, match=r"from /proc/x, which is mounted noexec; set \$TILEWRIGHT_CACHE to"):
        require_execution(proc / "x", "TILEWRIGHT_CACHE")
    require_execution(tmp_path / "absent", "TILEWRIGHT_CACHE")


def run(code: str, before: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def noexec(tmp_path: Path) -> tuple[list[str], Path]:
    """What to put before a command so that it sees a folder that is mounted noexec."""
    folder = tmp_path / "noexec"
    folder.mkdir()
    before = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o noexec tmpfs {folder} && exec "$@"', "sh"]
    if UNSHARE is None or subprocess.run([*before, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("nothing can be mounted here: it takes unshare, and namespaces of users")
    return before, folder


@pytest.mark.slow
def test_folders_mounted_noexec_are_named_with_what_to_set(noexec: tuple[list[str], Path], tmp_path: Path) -> None:
    before, folder = noexec
    own = {"TILEWRIGHT_DB": str(tmp_path / "t.db")}
    done = run(NOEXEC, before, TMPDIR=str(folder), TILEWRIGHT_CACHE=str(folder / "cache"), **own)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    for check, variable in (("cache", "$TILEWRIGHT_CACHE"), ("temporary", "$TMPDIR")):
        assert document[check]["status"] == "fail"
        assert "mounted noexec" in document[check]["message"]
        assert f"set {variable} to" in document[check]["message"]
    assert "Traceback" not in done.stderr
    of_roofline, *_, of_tune = done.stderr.splitlines()
    assert "mounted noexec; set $TMPDIR to" in of_roofline
    assert "mounted noexec; set $TILEWRIGHT_CACHE to" in of_tune


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[list[str], Path]:
    """What to put before a command so that it may not touch a folder of another user."""
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    for name in ("t.db", "config.json"):
        (folder / name).write_text("{}")
    if os.geteuid() != 0:
        folder.chmod(0)
        return [], folder
    os.chown(folder, 65534, 65534)
    before = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if SETPRIV is None or subprocess.run([*before, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("root cannot give up its rights here: it takes setpriv")
    return before, folder


@pytest.mark.slow
def test_what_this_user_may_not_touch_is_one_sentence(
    theirs: tuple[list[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before, folder = theirs
    request.addfinalizer(lambda: folder.chmod(0o700))
    tmp_path.chmod(0o700)
    own = {"TILEWRIGHT_DB": str(tmp_path / "t.db"), "TILEWRIGHT_CACHE": str(folder / "cache")}
    done = run(PERMISSIONS, before, str(folder), **own)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("tune: ")]) == 5
    assert [line.split()[0] for line in lines if line[0].isdigit()] == ["1"] * 6
    document = json.loads(done.stdout)
    for check in ("compiler", "cache", "database"):
        assert document[check]["status"] == "fail"
        assert str(folder) in document[check]["message"]
