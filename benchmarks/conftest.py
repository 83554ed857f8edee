"""What has to be settled before the benchmarks import anything."""

import os
import sys

import pytest

# They choose another kernel, cache size or thread count for numpy's OpenBLAS than it would choose by itself, which
# would make numpy a weaker peer than it is. OpenBLAS reads them when numpy is imported.
_OPENBLAS_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "OPENBLAS_MAIN_FREE")

_found = [name for name in _OPENBLAS_SETTINGS if os.environ.pop(name, None) is not None]
if _found and "numpy" in sys.modules:
    raise pytest.UsageError(f"numpy was imported under {', '.join(_found)} already: unset them and start again.")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the races add up to, below pytest-benchmark's own tables."""
    from summary import POINTS, TABLES, render

    if TABLES:
        terminalreporter.section("what races found")
        for line in (line for table in TABLES for line in table):
            terminalreporter.write_line(line)
    if POINTS:
        terminalreporter.section("ours against the best peer at each point")
        for line in render():
            terminalreporter.write_line(line)
