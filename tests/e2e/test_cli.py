"""The command line as a user meets it: mistakes, one small run, interruption, resume, and what is known afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from tilewright.codegen.backends.cpp.builder import find_compiler
from tilewright.errors import TilewrightError
from tilewright.runtime import Experts, ServeOptions, TilewrightWarning
from tilewright.tuner.cli import main

PROBLEM = "experts=4,n=48,k=40,top_k=2"


def _needs_compiler() -> None:
    try:
        find_compiler()
    except TilewrightError as error:
        pytest.skip(str(error))


def _tune(database: Path, *more: str) -> list[str]:
    return ["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--db", str(database), *more]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "tuning.db"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--arch", "sm_1", "--op", "moe_gemm"], "sm_1"),
        (["--arch", "native", "--op", "conv"], "conv"),
        (["--arch", "native", "--op", "moe_gemm", "--model", "mixtrall-8x7b"], "mixtral-8x7b"),
        (["--arch", "native", "--op", "moe_gemm", "--tp", "5"], "5"),
        (["--arch", "native", "--op", "moe_gemm", "--problem", "experts=0,n=4,k=4"], "experts=0"),
        (["--arch", "native", "--op", "moe_gemm", "--problem", "experts=4,n=4"], "k"),
        (["--arch", "native", "--op", "moe_gemm", "--problem", "experts"], "key=value"),
        (["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--tokens", "1,x"], "1,x"),
        (["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--tokens", "0"], "0"),
        (["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--time", "soon"], "soon"),
        (["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--trials", "0"], "--trials 0"),
        (["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--threads", "9999"], "9999"),
        (["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--routing", "odd"], "odd"),
        (["--arch", "native", "--op", "moe_gemm,conv"], "conv"),
        (["--arch", "native", "--op", "all", "--model", "no/folder"], "no/folder"),
        (["--arch", "native", "--op", "all", "--problem", PROBLEM], "--problem is one op's own"),
        (["--arch", "native", "--op", "gating,moe_gemm", "--template", "cpu_insert"], "--template is one op's own"),
        (["show", "--db", "nowhere.db"], "nowhere.db"),
        (["compare", "--db", "nowhere.db"], "nowhere.db"),
    ],
)
def test_a_mistake_gets_one_sentence(
    words: list[str], names: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("tune: ")
    assert names in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_tune_then_read_then_serve(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _needs_compiler()
    common = "experts=4,top_k=2"
    for stage in (f"{common},stage=up,activation=swiglu,n=48,k=40", f"{common},stage=down,n=40,k=48"):
        words = ["--arch", "native", "--op", "moe_gemm", "--problem", stage, "--tokens", "1,9"]
        assert main([*words, "--trials", "4", "--time", "5s", "--db", str(database), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        entries = document["signatures"][0]["problems"]
        assert [entry["size"] for entry in entries] == [1, 9]
        assert all(entry["tuned"]["samples"] and entry["tuned"]["low_us"] for entry in entries)
    for command in ("show", "compare", "doctor"):
        assert main([command, "--db", str(database), "--json"]) == 0
        json.loads(capsys.readouterr().out)
    up, down = torch.randn(4, 96, 40), torch.randn(4, 40, 48)
    x, logits = torch.randn(5, 40), torch.randn(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = Experts(up, down, top_k=2, options=ServeOptions(database=str(database)))(x, logits)
    with pytest.warns(TilewrightWarning):
        plain = Experts(up, down, top_k=2, options=ServeOptions(database="/nowhere/at/all.db"))(x, logits)
    torch.testing.assert_close(tuned, plain, rtol=1e-4, atol=1e-4)


def test_kill_9_loses_nothing_that_was_stored(database: Path) -> None:
    _needs_compiler()
    command = [sys.executable, "-m", "tilewright.tuner.cli", *_tune(database, "--tokens", "1,5", "--trials", "200")]
    for wait_s in (1.5, 3.0, 4.5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(wait_s)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert main(_tune(database, "--tokens", "1,5", "--trials", "4", "--resume")) == 0
    assert main(["doctor", "--db", str(database)]) == 0
