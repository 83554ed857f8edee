"""Artifacts are loaded by the launcher of their kind, which the registry finds."""

import pytest

from tilewright.runtime.launchers import registry
from tilewright.runtime.launchers.base import KernelRefused, Launcher


@pytest.mark.parametrize("kind", registry._LAUNCHERS)
def test_a_launcher_is_registered_under_the_kind_that_it_loads(kind: str) -> None:
    launcher = registry.find_launcher(kind)
    assert isinstance(launcher, Launcher)
    assert launcher.kind == kind


def test_a_kind_without_a_launcher_is_refused_by_name() -> None:
    with pytest.raises(KernelRefused, match="nothing here launches 'hsaco' artifacts, only host_so"):
        registry.find_launcher("hsaco")
