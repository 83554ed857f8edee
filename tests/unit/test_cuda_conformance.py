"""The stand-in answers every call of the conformance record as devices did, or as documents say that they would.

Records of devices lie in tests/standin/conformance/records, and are made by run.py on a machine with a GPU.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from executing import executing
from standin_kernels import ENTRIES, SOURCE, write

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).parents[1] / "standin/conformance"
CALLS: list[dict[str, Any]] = json.loads((FOLDER / "calls.json").read_text())
RECORDS = sorted((FOLDER / "records").glob("*.json"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the stand-in says, as a device of compute capability 9.0."""
    folder = tmp_path_factory.mktemp("cubins")
    write(folder)
    with executing(("sm_90",)) as cuda:
        for name, spec in ENTRIES.items():
            cuda.know((folder / f"{name}.sm_90.cubin").read_bytes(), SOURCE, (spec,))
        made = runpy.run_path(str(FOLDER / "run.py"))["record"](str(cuda.path), folder)
        assert len(cuda.complaints) == sum("nowhere" in call["call"] and call.get("alone", False) for call in CALLS)
        assert all("0x1000, where nothing is allocated" in each for each in cuda.complaints)
        cuda.complaints.clear()
    assert made["capability"] == 90
    answers: dict[str, str] = made["answers"]
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call["call"])
def test_the_stand_in_answers_as_the_documents_say(call: dict[str, Any], answers: dict[str, str]) -> None:
    assert answers[call["call"]] == call["expected"]
    assert call["source"]


@pytest.mark.slow
@pytest.mark.skipif(not RECORDS, reason="no device has been asked yet: what is expected is from documents")
def test_the_stand_in_answers_as_devices_did(answers: dict[str, str]) -> None:
    for path in RECORDS:
        recorded = json.loads(path.read_text())
        assert recorded["answers"] == {name: answers[name] for name in recorded["answers"]}, path.stem
