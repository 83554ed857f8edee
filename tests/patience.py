"""Waiting in tests: for as long as a hang would, never for as long as an idle machine takes."""

import time
from collections.abc import Callable

PATIENCE_S = 600.0
"""Longest wait for what happens at once on an idle machine; a busy one is not blamed."""


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Return once ``holds()``; ``what`` says what went wrong where it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
