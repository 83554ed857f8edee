"""Cores that a process can keep busy, under every kind of limit that containers are given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.codegen.hardware.cores import Cores, cores, usable_cores

ALLOWED = len(os.sched_getaffinity(0))


def process_in(folder: Path, groups: str, mounts: list[str], files: dict[str, str]) -> Path:
    """A folder as /proc/self, with hierarchies of groups mounted in ``folder``."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "cgroup").write_text(groups)
    (folder / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/root rw\n" + "\n".join(mounts) + "\n")
    return folder


def v1(folder: Path, root: str = "/") -> str:
    return f"40 39 0:3 {root} {folder}/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"


def v2(folder: Path, root: str = "/", point: str = "unified") -> str:
    return f"41 39 0:4 {root} {folder}/{point} rw,relatime - cgroup2 cgroup2 rw,nsdelegate"


V1 = {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}
CASES = {
    "no groups at all": ("", [], {}, None),
    "v1, no limit": ("4:cpu,cpuacct:/a\n", [v1], V1, None),
    "v1, half a core": ("4:cpu,cpuacct:/a\n", [v1], V1 | {"cpu/a/cpu.cfs_quota_us": "50000\n"}, 0.5),
    "v1, of a group above": (
        "4:cpu,cpuacct:/a/b/c\n",
        [v1],
        {
            "cpu/a/b/c/cpu.cfs_quota_us": "400000",
            "cpu/a/b/c/cpu.cfs_period_us": "100000",
            "cpu/a/cpu.cfs_quota_us": "300000",
            "cpu/a/cpu.cfs_period_us": "200000",
        },
        1.5,
    ),
    "v1, the container's own group is all it sees": (
        "4:cpu,cpuacct:/docker/1f\n",
        [lambda folder: v1(folder, "/docker/1f")],
        {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"},
        2.5,
    ),
    "v1, another controller's groups": ("4:cpuset:/a\n", [v1], V1 | {"cpu/a/cpu.cfs_quota_us": "50000"}, None),
    "v2, no limit": ("0::/a\n", [v2], {"unified/a/cpu.max": "max 100000\n"}, None),
    "v2, one and a half cores": ("0::/a\n", [v2], {"unified/a/cpu.max": "150000 100000\n"}, 1.5),
    "v2, of a group above": (
        "0::/a/b\n",
        [v2],
        {"unified/a/cpu.max": "75000 50000\n", "unified/a/b/cpu.max": "max 100000\n"},
        1.5,
    ),
    "v2, a group outside of what is seen": (
        "0::/../other\n",
        [v2],
        {"unified/cpu.max": "200000 100000\n"},
        2.0,
    ),
    "v2, a mount point with a blank": (
        "0::/\n",
        [lambda folder: v2(folder, point="my\\040groups")],
        {"my groups/cpu.max": "100000 100000\n"},
        1.0,
    ),
    "both versions": (
        "4:cpu:/a\n0::/b\n",
        [v1, v2],
        V1 | {"cpu/a/cpu.cfs_quota_us": "300000", "unified/b/cpu.max": "200000 100000"},
        2.0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_least_quota_of_all_groups_is_found(name: str, tmp_path: Path) -> None:
    groups, mounts, files, expected = CASES[name]
    process = process_in(tmp_path, groups, [mount(tmp_path) for mount in mounts], files)
    assert cores(process) == Cores(ALLOWED, expected)


def test_a_quota_counts_as_whole_cores_but_never_none() -> None:
    quotas = (None, 0.25, 1.0, 1.5, 3.99, 64.0)
    assert [Cores(8, quota).usable for quota in quotas] == [8, 1, 1, 1, 3, 8]


def test_people_are_told_of_a_quota_that_takes_cores_away() -> None:
    assert str(Cores(8, 1.5)) == "1 core of 8, for a cgroup's quota allows the time of 1.5"
    assert str(Cores(8, 8.0)) == str(Cores(8, None)) == "8 cores"


def test_what_is_not_readable_is_no_limit(tmp_path: Path) -> None:
    assert cores(tmp_path / "absent") == Cores(ALLOWED, None)


def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_quota_of_this_machine_counts() -> None:
    group = Path("/sys/fs/cgroup/cpu") / f"tilewright-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("50000")
    except OSError as error:
        pytest.skip(f"no group of cgroups can be made here ({error.strerror})")
    ask = "from tilewright.codegen.hardware.cores import cores; print(cores().quota)"
    inside = ["sh", "-c", f'echo $$ > {group}/tasks && exec "$@"', "sh", sys.executable, "-c", ask]
    try:
        assert subprocess.run(inside, capture_output=True, text=True, check=True).stdout == "0.5\n"
    finally:
        group.rmdir()
