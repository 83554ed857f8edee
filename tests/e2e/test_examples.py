"""The examples run as their first lines say, also where nothing was tuned."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_serving_experts_without_a_plan(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "serve_experts.py")],
        env={**os.environ, "TILEWRIGHT_DB": str(tmp_path / "none.db")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if "x" in line and "ms" in line] == [
        "1",
        "4",
        "16",
        "64",
        "256",
    ]
    assert "torch: there is no database" in done.stdout
