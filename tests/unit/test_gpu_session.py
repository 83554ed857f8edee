"""A session's parts cost themselves alone, and what was seen is written after each."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks/gpu_session"
PART = """
import os, sys, time
name, result = sys.argv[1], sys.argv[3]
if name != "silent":
    open(result, "w").write('{"table": ["one line"]}')
print("the last thing that was said", flush=True)
{"fine": lambda: None, "silent": lambda: sys.exit(3), "crash": os.abort, "hang": lambda: time.sleep(600)}[name]()
"""


@pytest.fixture
def module(tmp_path: Path) -> dict[str, Any]:
    """The session with parts of our own."""
    (tmp_path / "part.py").write_text(PART)
    found = runpy.run_path(str(FOLDER / "session.py"))
    found["Session"].run.__globals__["HERE"] = tmp_path
    return found


def test_a_part_that_crashes_or_hangs_costs_itself_alone(module: dict[str, Any], tmp_path: Path) -> None:
    session = module["Session"](tmp_path / "prepared", tmp_path, False)
    statuses = []
    for name in ("crash", "silent", "hang", "fine"):
        session.run(module["Part"](name, 2 if name == "hang" else 60, "a test"))
        document = json.loads((tmp_path / "session.json").read_text())  # after each part
        statuses.append(document["parts"][-1]["status"])
    assert statuses == ["failed with status -6", "failed with status 3", "ended at its limit", "done"]
    assert not session.is_done
    hung = document["parts"][2]
    assert hung["result"] == {"table": ["one line"]}  # what was known when it was ended
    assert "the last thing that was said" in hung["said"]
    assert (tmp_path / "session.txt").read_text().startswith("session\n")


def test_a_rehearsal_says_that_nothing_ran_on_a_gpu(module: dict[str, Any], tmp_path: Path) -> None:
    session = module["Session"](tmp_path / "prepared", tmp_path, True)
    session.run(module["Part"]("fine", 60, "a test"))
    assert session.is_done
    assert "nothing ran on a GPU" in json.loads((tmp_path / "session.json").read_text())["kind"]


def test_all_parts_end_within_eight_minutes(module: dict[str, Any]) -> None:
    assert sum(part.limit_s for part in module["PARTS"]) <= 480
    page = (FOLDER.parents[1] / "docs/gpu-session.md").read_text()
    for part in module["PARTS"]:
        assert f"| `{part.name}` | {part.limit_s} s |" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--prepared", "nowhere"], "was not prepared"), (["--parts", "load,lunch", "--prepared", "."], "'lunch'")],
)
def test_a_mistake_is_one_sentence(
    words: list[str],
    said: str,
    module: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepared.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["session.py", *words, "--out", "out"])
    assert module["main"]() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
