"""Shared by all tests. Its place also puts this directory on the import path, for the helpers beside it."""

import pytest
from hypothesis import settings

# A slow machine is no failure: tests never judge time.
settings.register_profile("tilewright", deadline=None)
settings.load_profile("tilewright")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the sources of tests/golden anew")
