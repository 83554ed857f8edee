"""Folders whose names are no UTF-8, as old archives and other systems leave them."""

import os
from pathlib import Path

import pytest

from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder
from tilewright.codegen.hardware.archs import CPU_ARCHS
from tilewright.tuner.cli import main
from tilewright.tuning_db.locations import sqlite_path
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.store import Store


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    path = tmp_path / os.fsdecode(b"p\xe4th")
    try:
        path.mkdir(mode=0o700)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    return path


def test_a_database_there_is_written_and_read_and_shown(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = odd / "t.db"
    with Store.open(str(database)) as store:
        run = store.start_run(f"tune --db {database}", versions={}, host="here")
        assert run.command.endswith("p?th/t.db")
    assert Reader.open(str(database)).plans_for("gating", "none") == ()
    assert main(["show", "--db", str(database)]) == 0
    assert "p\N{REPLACEMENT CHARACTER}th/t.db" in capsys.readouterr().out


def test_a_url_names_it_too(odd: Path) -> None:
    assert sqlite_path(f"sqlite:///{odd.parent}/p%E4th/t.db") == odd / "t.db"


def test_a_compilers_flags_may_name_it(odd: Path) -> None:
    builder = CppBuilder(CPU_ARCHS["x86_64_avx2"], Compiler(f"g++ -I{odd}", "g++ 12"), odd / "cache")
    assert "p\\xe4th" in builder.toolchain
    assert builder.path_for("a").parent.parent == odd / "cache"
