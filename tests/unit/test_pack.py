"""Packs: what is in them, and that nothing half-written is ever left behind."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tuning_db_samples import DEVICE, Filled, fill, plan

from tilewright.errors import TilewrightError
from tilewright.tuning_db.pack import write_pack
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.records import PlanEntry
from tilewright.tuning_db.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "tuning.db")


@pytest.fixture
def filled(store: Store) -> Filled:
    return fill(store)


def test_a_pack_holds_plans_and_what_they_need(store: Store, filled: Filled, tmp_path: Path) -> None:
    path = tmp_path / "served.pack"
    pack = write_pack(store, store.plans(), path)
    assert (pack.plans, pack.kernels, pack.bytes) == (1, 1, path.stat().st_size)
    with Store.open_read_only(path) as packed:
        assert packed.plans() == [filled.plan]
        assert packed.kernels() == [filled.kernel]
        assert packed.devices() == [DEVICE]
        assert packed.check() == []
        assert packed.counts().trials == packed.counts().runs == 0
    assert Reader.open(path).artifact(filled.artifacts[0].checksum) == filled.artifacts[0].data


def test_a_pack_is_a_single_file(store: Store, filled: Filled, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "served.pack"
    path.parent.mkdir()
    write_pack(store, [filled.plan], path)
    assert [each.name for each in path.parent.iterdir()] == ["served.pack"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_what_exists_is_left_alone(store: Store, filled: Filled, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("mine")
    with pytest.raises(TilewrightError, match="precious exists already"):
        write_pack(store, [filled.plan], path)
    assert path.read_text() == "mine"


@pytest.mark.usefixtures("filled")
def test_a_plan_without_its_kernel_makes_no_pack(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "served.pack"
    broken = replace(plan(None), entries=(PlanEntry(None, "f" * 64),))
    before = set(tmp_path.iterdir())
    with pytest.raises(TilewrightError, match="ffffffffffffffff"):
        write_pack(store, [broken], path)
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_is_not_there(store: Store, filled: Filled, tmp_path: Path) -> None:
    with pytest.raises(TilewrightError, match="missing"):
        write_pack(store, [filled.plan], tmp_path / "missing" / "served.pack")
