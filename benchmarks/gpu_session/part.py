"""Runs one part of a session and writes its result: ``part.py NAME PREPARED RESULT.json [--rehearse]``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src"), str(HERE.parents[1] / "tests")]

REPEATS = 15
"""How often parts time something; a rehearsal times nothing, and does everything once."""


def main() -> None:
    """Run the part; it writes whenever it knows more, so that a limit costs only what was not yet known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("prepared", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    part = importlib.import_module(f"parts.{options.name}")

    def tell(result: dict[str, Any]) -> None:
        draft = options.result.with_suffix(".part")
        draft.write_text(json.dumps(result))
        draft.replace(options.result)

    with contextlib.ExitStack() as stack:
        if options.rehearse:
            import pytest
            from posing import posing

            stack.enter_context(posing(stack.enter_context(pytest.MonkeyPatch.context())))
        part.run(options.prepared, tell, 1 if options.rehearse else REPEATS)


if __name__ == "__main__":
    main()
