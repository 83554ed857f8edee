import sys
from pathlib import Path

import pytest

from tilewright.errors import TilewrightError
from tilewright.tuning_db.locations import default_url, sqlite_path, user_database

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other platforms have other places")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILEWRIGHT_DB", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")


@linux
def test_the_default_is_in_the_users_data() -> None:
    assert default_url() == str(user_database()) == "/home/someone/.local/share/tilewright/tuning.db"


def test_the_environment_names_a_path_or_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_DB", "postgresql://team/tuning")
    assert default_url() == "postgresql://team/tuning"
    monkeypatch.setenv("TILEWRIGHT_DB", "")
    assert default_url() == str(user_database())


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("tuning.db", "tuning.db"),
        ("/a/b c.db", "/a/b c.db"),
        ("what?.db", "what?.db"),
        ("50%20.db", "50%20.db"),
        ("~/t.db", "/home/someone/t.db"),
        ("sqlite:///tuning.db", "tuning.db"),
        ("sqlite:////a/b.db", "/a/b.db"),
        ("sqlite+pysqlite:////a/b%20c%3F.db", "/a/b c?.db"),
    ],
)
def test_paths_and_sqlite_urls_name_a_file(name: str, path: str) -> None:
    assert sqlite_path(name) == Path(path)
    assert sqlite_path(Path("x.db")) == Path("x.db")


def test_other_urls_name_no_file() -> None:
    assert sqlite_path("postgresql+psycopg://user:secret@host/db?sslmode=require") is None


@pytest.mark.parametrize(
    "name", ["", ":memory:", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///a.db?x=1"]
)
def test_a_name_that_keeps_nothing_is_refused(name: str) -> None:
    with pytest.raises(TilewrightError, match=r"give (a path|the path)"):
        sqlite_path(name)
