"""The two implementations of the call layer, for suites that both inherit."""

import pytest
from hypothesis import HealthCheck, settings

from tilewright.runtime.calls import bind as calls
from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.serve import routing
from tilewright.runtime.weights import packing

own_settings = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


class CallContract:
    """Inherited by the tests of one implementation, which choose it in ``implementation``."""

    @pytest.fixture(autouse=True)
    def fresh_warnings(self):
        forget_warnings()


class Native:
    @pytest.fixture(autouse=True)
    def implementation(self):
        if native_for_torch() is None:
            pytest.skip("the extension was not built")
        assert calls.IMPLEMENTATION == "native"


class Pure:
    @pytest.fixture(autouse=True)
    def implementation(self, monkeypatch):
        monkeypatch.setattr(calls, "_NATIVE", None)
        monkeypatch.setattr(routing, "_NATIVE", None)
        monkeypatch.setattr(packing, "native_module", lambda: None)
