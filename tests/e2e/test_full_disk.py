"""A disk that fills up, at points of everything that reads or writes: the right sentence, and nothing lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from covering import FULL
from failing_disk import environment
from naive_kernels import build, needs_compiler

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature

ACTIONS = Path(__file__).parents[1] / "full_disk_actions.py"
POINTS = {
    "Make": (0, 1, 2, 4, 15, 30),
    "Add": (0, 1, 2, 5, 12, 25, 40),
    "Upgrade": (0, 1, 2, 9, 25),
    "Read": (0, 1, 2, 5, 9),
    "Pack": (0, 4, 25, 45, 60),
    "Export": (0, 2, 4),
    "Study": (0, 1, 4),
    "Build": (2,),
    "Temporary": (2,),
    "Output": (0,),
}
"""Writes that go well before the disk is full, by what is done (tests/full_disk_actions.py)."""
SAID = {"ENOSPC": ("disk is full",), "EDQUOT": ("quota",), "EIO": ("disk failed", "free space, quota and health")}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("error", SAID if FULL else ["ENOSPC"])
def test_nothing_is_lost_and_the_sentence_names_the_disk(tmp_path: Path, error: str) -> None:
    tmp_path.chmod(0o700)
    kernel = tmp_path / "kernel.so"
    kernel.write_bytes(build(MoeGemmSignature(stage="plain", experts=3, n=6, k=5)).artifact.data)
    points = dict.fromkeys(POINTS, range(80)) if FULL else POINTS
    done = subprocess.run(
        [
            *(sys.executable, str(ACTIONS), str(tmp_path / "disk"), error),
            *(f"{name}:{','.join(map(str, numbers))}" for name, numbers in points.items()),
        ],
        env={**environment(tmp_path, tmp_path / "disk"), "FAILING_DISK_KERNEL": str(kernel)},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert len(found) == sum(map(len, points.values()))
    assert [each for each in found if each["fault"]] == []
    failed = [each for each in found if each["said"]]
    assert [each for each in failed if not any(said in each["said"] for said in SAID[error])] == []
    assert [each for each in failed if "\n" in each["said"]] == []
    assert len(failed) >= 35
    assert {each["action"] for each in failed} == set(POINTS)
    if FULL:
        print(f"{error}: {len(failed)} points of {len(found)} failed, each with its sentence", file=sys.stderr)
