"""Ctrl-C and SIGTERM: the run ends at once, says how to go on, and what it had measured is there."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S, wait_until

from tilewright.codegen.backends.cpp.builder import find_compiler
from tilewright.errors import TilewrightError
from tilewright.tuning_db.store import Store


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
        wait_until(lambda: _trials(database) or process.poll() is not None, "no trial was ever stored")
        assert process.poll() is None, process.communicate()
        process.send_signal(signal_number)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
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
