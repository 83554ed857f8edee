"""Shared by all tests. Its place also puts this directory on the import path, for the helpers beside it."""

import signal

import pytest
from hypothesis import settings

# A slow machine is no failure: tests never judge time.
settings.register_profile("tilewright", deadline=None)
settings.load_profile("tilewright")

# Started in the background of a script, everything ignores Ctrl-C, the processes that tests start among it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the sources of tests/golden anew")
