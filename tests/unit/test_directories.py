"""Where a user's files go: on Linux the places of the XDG specification, elsewhere those of the platform."""

import os
import pwd
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from tilewright.directories import user_cache_directory, user_data_directory
from tilewright.errors import TilewrightError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other platforms have other places")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TILEWRIGHT_CACHE", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")


def test_the_places_of_a_user_who_has_set_nothing() -> None:
    assert user_data_directory() == Path("/home/someone/.local/share/tilewright")
    assert user_cache_directory() == Path("/home/someone/.cache/tilewright")


def test_xdg_moves_them_unless_it_is_relative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert (user_data_directory(), user_cache_directory()) == (Path("/data/tilewright"), Path("/cache/tilewright"))
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    test_the_places_of_a_user_who_has_set_nothing()


def test_the_cache_is_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("TILEWRIGHT_CACHE", "/fast")
    assert user_cache_directory() == Path("/fast")
    monkeypatch.setenv("TILEWRIGHT_CACHE", "~/fast")
    assert user_cache_directory() == Path("/home/someone/fast")
    monkeypatch.setenv("TILEWRIGHT_CACHE", "")
    assert user_cache_directory() == Path("/cache/tilewright")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_uid: int) -> NoReturn:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for home in (None, "", "relative"):
        if home is None:
            monkeypatch.delenv("HOME")
        else:
            monkeypatch.setenv("HOME", home)
        for directory in (user_data_directory, user_cache_directory):
            with pytest.raises(TilewrightError, match=r"no home directory; set \$HOME, or both \$TILEWRIGHT_DB"):
                directory()
    monkeypatch.setenv("TILEWRIGHT_CACHE", os.fspath(Path("/fast")))
    assert user_cache_directory() == Path("/fast")
