"""Ctrl-C and SIGTERM: the run ends at once, says how to go on, and what it had measured is there."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from covering import FULL
from patience import PATIENCE_S, wait_until

from tilewright.codegen.backends.cpp.builder import find_compiler
from tilewright.errors import TilewrightError
from tilewright.tuning_db.store import Store

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("signal_number", SIGNALS if FULL else SIGNALS[:2])
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
    assert process.returncode == 128 + signal_number
    assert stdout == ""
    assert "interrupted" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert _trials(database)


@pytest.mark.parametrize("signal_number", SIGNALS)
def test_a_command_that_has_only_just_started_ends_in_a_sentence(signal_number: signal.Signals) -> None:
    # It is told in the middle of an import, by the module that is imported.
    code = f"""
import importlib.abc, os, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "numpy":
            os.kill(os.getpid(), {int(signal_number)})
sys.meta_path.insert(0, Finder())
from tilewright.tuner.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    name = "" if signal_number == signal.SIGINT else f" by {signal_number.name}"
    assert (done.returncode, done.stderr) == (128 + signal_number, f"\ntune: interrupted{name} before it began\n")


def test_two_signals_at_once_are_one_and_a_later_one_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os, signal, time
from tilewright.tuner.signals import Signals
signals = Signals()
with signals.heeded():
    signals.begin()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        print(signals, signals.exit_code, flush=True)
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "interrupted by SIGTERM 143\n")
    assert done.stderr == "\ntune: interrupted again, and ends at once\n"


def _trials(database: Path) -> int:
    with Store.open_read_only(database) as store:
        assert store.check() == []
        return store.counts().trials
