"""Measures the prepared models with ``tune measure``: races, plans, and how good the predictions were."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilewright.tuner.cli import main as tune

TIME = "150s"
TOP = "2"


def run(prepared: Path, tell: Callable[[dict[str, Any]], None], _repeats: int) -> None:
    """All plans of the models, within the time that there is."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        words = ["measure", "--db", str(prepared / "models.db"), "--top", TOP, "--time", TIME, "--json"]
        status = tune(words)
    document = json.loads(said.getvalue()) if said.getvalue().strip() else {}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        tune(["show", "--db", str(prepared / "models.db")])
    tell({"document": document, "table": shown.getvalue().splitlines()})
    if status:
        raise SystemExit(f"tune measure ended with status {status}")
