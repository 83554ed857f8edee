"""Asks the driver what the stand-in has to answer: a record for tests/standin/conformance/records."""

from __future__ import annotations

import ctypes
import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[3] / "tests/standin/conformance"


def run(prepared: Path, tell: Callable[[dict[str, Any]], None], _repeats: int) -> None:
    """All calls; what is answered otherwise than documents say is listed, and is no failure."""
    library = os.environ.get("TILEWRIGHT_CUDA_DRIVER", "libcuda.so.1")
    ctypes.CDLL(library)  # a sentence by the loader, before anything is begun
    record = runpy.run_path(str(FOLDER / "run.py"))["record"](library, prepared / "conformance")
    expected = {each["call"]: each["expected"] for each in json.loads((FOLDER / "calls.json").read_text())}
    others = [
        f"{call}: {answer}, where documents say {expected[call]}"
        for call, answer in record["answers"].items()
        if answer != expected[call]
    ]
    tell({**record, "table": [f"{len(record['answers'])} calls, {len(others)} answered otherwise", *others]})
