"""Shared by all tests. Its place also puts this directory on the import path, for the helpers beside it."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A slow machine is no failure: tests never judge time.
settings.register_profile("tilewright", deadline=None)
settings.load_profile("tilewright")

# The processes that tests start import the same modules hundreds of times: let them keep what they compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Started in the background of a script, everything ignores Ctrl-C, the processes that tests start among it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the sources of tests/golden anew")
    parser.addoption("--quick", action="store_true", help="no slow test, and two cases of each contract")


def pytest_configure(config: pytest.Config) -> None:
    """Give all processes of this run one cache, so that what one test built is not built again by another.

    And no width: tables that are read by tests are as wide as they want to be, whatever terminal the run began in.
    """
    os.environ.pop("COLUMNS", None)
    if "TILEWRIGHT_CACHE" not in os.environ:
        cache = os.environ["TILEWRIGHT_CACHE"] = tempfile.mkdtemp(prefix="tilewright-tests-")
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--quick``: leave out slow tests, and all but two spread cases of each contract."""
    if not config.getoption("--quick"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            of_contract = "contract" in item.path.parts
            cases.setdefault(item.nodeid.partition("[")[0] if of_contract else item.nodeid, []).append(item)
    kept = {item for each in cases.values() for item in (each[0], each[len(each) // 2])}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True, scope="module")
def no_device_is_left() -> Iterator[None]:
    """The stand-in of the CUDA driver stays loaded, and whoever opens libcuda.so.1 later in this process gets it."""
    yield
    if "cuda_standin" in sys.modules:
        sys.modules["cuda_standin"].forget_devices()
