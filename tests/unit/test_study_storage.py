"""What ``--study`` may name, and in which words anything else is refused."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import optuna
import pytest

from tilewright.errors import TilewrightError
from tilewright.tuner.search.storage import open_storage
from tilewright.tuning_db.store import Store


@pytest.fixture(autouse=True)
def fresh():
    """Every test opens anew what another one may have opened."""
    open_storage.cache_clear()
    yield
    open_storage.cache_clear()


def test_no_name_means_in_memory() -> None:
    assert open_storage("") is None


@pytest.mark.parametrize("form", ["{}/studies.log", "journal://{}/studies.log", "sqlite:///{}/studies.db"])
def test_studies_are_there_when_they_are_opened_again(tmp_path: Path, form: str) -> None:
    url = form.format(tmp_path)
    study = optuna.create_study(study_name="run", storage=open_storage(url))
    study.tell(study.ask({"tile": optuna.distributions.IntDistribution(8, 64, log=True)}), 3.0)
    open_storage.cache_clear()
    assert optuna.load_study(study_name="run", storage=open_storage(url)).best_value == 3.0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/missing/studies.log", r"cannot be opened \(.*No such file or directory.*\); give a file for Optuna's"),
        ("{}", r"cannot be opened \(.*Is a directory.*\); give a file"),
        ("sqlite:///{}/missing/studies.db", r"cannot be opened \(.*unable to open database file\); give a file"),
        ("nonsense://x", r"cannot be opened \(Can't load plugin: .*nonsense\); give a file"),
        ("sqlite://x:y", r"cannot be opened \(.*\); give a file"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_sentence(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(TilewrightError, match=message) as caught:
        open_storage(url.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_driver_that_is_missing_is_named() -> None:
    with pytest.raises(TilewrightError, match="needs the package MySQLdb; pip install it"):
        open_storage("mysql://user:secret@nowhere/studies")


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(TilewrightError) as caught:
        open_storage("mysql://user:secret@nowhere/studies")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", [b"a shopping list\n", b"\xff\xfe\x00rubbish\n", b'{"op_code": "x"}\n', b"[1]\n"])
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(TilewrightError, match=r"list\.txt is a file, but no journal of Optuna's; name a new one"):
        open_storage(str(path))
    assert path.read_bytes() == content


def test_our_own_database_is_not_mixed_with_optunas(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    Store.open(path).close()
    with sqlite3.connect(path) as database:
        tables = database.execute("select name from sqlite_master").fetchall()
    with pytest.raises(TilewrightError, match="holds other things than Optuna studies; name a new database"):
        open_storage(f"sqlite:///{path}")
    with pytest.raises(TilewrightError, match="is a file, but no journal of Optuna's"):
        open_storage(str(path))
    with sqlite3.connect(path) as database:
        assert database.execute("select name from sqlite_master").fetchall() == tables


@pytest.mark.parametrize("form", ["{}/studies.log", "sqlite:///{}/studies.db"])
def test_studies_that_others_could_have_written_are_not_read(tmp_path: Path, form: str) -> None:
    optuna.create_study(study_name="run", storage=open_storage(form.format(tmp_path)))
    open_storage.cache_clear()
    for path in tmp_path.iterdir():
        path.chmod(0o666)
    with pytest.raises(TilewrightError, match=r"can be written by others \(mode 0666\), and studies can hold code"):
        open_storage(form.format(tmp_path))


@pytest.mark.parametrize("form", ["{}", "journal://{}", "sqlite:///{}"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, form: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(TilewrightError, match=r"a pipe or a device|is no file|belongs|can be written by"):
            open_storage(form.format(path))


def test_a_journal_that_is_nested_without_end_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "studies.log").write_text("[" * 100_000)
    (tmp_path / "studies.log").chmod(0o600)
    with pytest.raises(TilewrightError, match="no journal of Optuna's"):
        open_storage(str(tmp_path / "studies.log"))
