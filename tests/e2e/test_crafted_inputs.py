"""Databases, packs, caches and recipes that somebody crafted: no foreign code, no crash, no hang, one sentence each.

A few are drawn by default, 3,000 with ``TILEWRIGHT_FULL=1`` (tests/crafted.py).
"""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from covering import FULL
from naive_kernels import needs_compiler
from patience import PATIENCE_S

CRAFTED = Path(__file__).parents[1] / "crafted.py"
COUNT = 3000 if FULL else 20


def drawn(folder: Path, first: int, count: int) -> list[dict]:
    """What became of each; a process that crashes or hangs is followed by another, which goes on behind that one."""
    found = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CRAFTED.parent), *sys.path])}
    end = first + count
    log = (folder.parent / "errors").open("w+")
    while first < end:
        command = [sys.executable, str(CRAFTED), str(folder), str(first), str(end - first)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        begun = first
        watch = threading.Timer(PATIENCE_S, process.kill)
        watch.start()
        for line in process.stdout:
            watch.cancel()
            watch = threading.Timer(PATIENCE_S, process.kill)
            watch.start()
            told = json.loads(line)
            if "begins" in told:
                begun = told["begins"]
            else:
                found.append(told)
                begun = told["number"] + 1
        watch.cancel()
        process.stdout.close()
        if process.wait() != 0:
            log.seek(0)
            said = log.read()[-300:]
            found.append({"number": begun, "way": "", "what": "", "faults": [f"ended {process.returncode}: {said}"]})
            begun += 1
        first = begun
    log.close()
    return found


@needs_compiler
@pytest.mark.slow
def test_nothing_that_was_crafted_runs_crashes_hangs_or_says_more_than_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    found = drawn(tmp_path / "crafted", 0, COUNT)
    assert [each["number"] for each in found] == list(range(COUNT))
    if FULL:
        print(Counter(each["way"] for each in found), max(each["slowest_s"] for each in found), file=sys.stderr)
    assert [each for each in found if each["faults"]] == []
