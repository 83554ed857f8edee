"""Ctrl-C and SIGTERM: the run ends at once, says how to go on, and what it had measured is there."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilewright.codegen.backends.cpp.builder import find_compiler
from tilewright.errors import TilewrightError
from tilewright.tuning_db.store import Store

START_LIMIT_S = 60


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_trials(signal_number: signal.Signals, tmp_path: Path) -> None:
    try:
        find_compiler()
    except TilewrightError as error:
        pytest.skip(str(error))
    tmp_path.chmod(0o700)
    database = tmp_path / "tuning.db"
    with Store.open(database):
        pass
    words = ["--arch", "native", "--op", "moe_gemm", "--problem", "experts=4,n=48,k=40,top_k=2", "--trials", "2000"]
    command = [sys.executable, "-m", "tilewright.tuner.cli", *words, "--db", str(database)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not _trials(database):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal_number)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert stdout == ""
    assert "interrupted" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert _trials(database)


def _trials(database: Path) -> int:
    with Store.open_read_only(database) as store:
        assert store.check() == []
        return store.counts().trials
