"""`tune pack`: the file serves read-only and offline, and what is wrong with one is said in one sentence."""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from naive_kernels import Built, build, needs_compiler, store_plan

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.runtime import ServeOptions, TilewrightWarning, prepare
from tilewright.runtime.notices import forget_warnings
from tilewright.tuner.cli import main
from tilewright.tuning_db.store import Store

pytestmark = needs_compiler

SIGNATURE = MoeGemmSignature(stage="plain", experts=2, n=4, k=6)
_salts = itertools.count(1000)
SERVE = """
import os, sys

def refuse(event, arguments):
    if event.startswith("socket."):
        raise SystemExit(f"the network was asked: {event}")
    if event == "open" and str(arguments[0]).startswith(FOLDER) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        raise SystemExit(f"{arguments[0]} was opened to be written")

import torch
from tilewright.runtime import ServeOptions, prepare
FOLDER = os.path.dirname(sys.argv[1])
sys.addaudithook(refuse)
call = prepare(torch.ones(2, 4, 6), stage="plain", options=ServeOptions(threads=1))
out = call(torch.ones(3, 6), torch.tensor([0, 1, 3], dtype=torch.int32), torch.empty(3, 4))
print(out.unique().tolist())
"""


def fresh_kernel() -> Built:
    """A kernel that doubles what torch would give, and whose bytes this process has never loaded."""
    return build(SIGNATURE, mark=2.0, salt=next(_salts))


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A pack of one plan."""
    forget_warnings()
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    tmp_path.chmod(0o700)
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, fresh_kernel())])
    with Store.open(database) as store:
        store.finish_run(store.start_run("tune", versions={}, host="here").id)
    folder = tmp_path / "deployed"
    folder.mkdir(mode=0o700)
    path = folder / "served.pack"
    assert main(["pack", str(path), "--db", str(database)]) == 0
    assert f"TILEWRIGHT_DB={path}" in capsys.readouterr().out
    return path


def test_a_pack_serves_read_only_and_offline(pack: Path) -> None:
    before = pack.read_bytes()
    pack.chmod(0o400)
    pack.parent.chmod(0o500)
    environment = {**os.environ, "TILEWRIGHT_DB": str(pack), "PATH": ""}
    served = subprocess.run(
        [sys.executable, "-W", "error", "-c", SERVE, str(pack)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert served.stdout == "[12.0]\n", served.stderr
    assert [path.name for path in pack.parent.iterdir()] == [pack.name]
    assert pack.read_bytes() == before


def test_a_pack_holds_no_trials_and_is_shown(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open_read_only(pack) as store:
        counts = store.counts()
        assert (counts.trials, counts.runs, counts.plans, counts.kernels) == (0, 0, 1, 1)
    assert main(["show", "--db", str(pack)]) == 0
    assert "any more tokens: " in capsys.readouterr().out


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


def changed(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement)
            connection.commit()

    return change


def foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (text)")


def no_database(path: Path) -> None:
    path.write_text("this is no pack\n" * 100)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncated, "damaged"),
        (overwritten, "damaged"),
        (no_database, "not a database|no database|damaged"),
        (foreign, "is a database of another program"),
        (changed("PRAGMA user_version = 99"), "written by a newer tilewright .*version 99"),
        (changed("UPDATE plans SET threads = 3"), "damaged"),
        (changed("UPDATE artifacts SET data = x'00'"), "artifact .* is damaged"),
        (changed("UPDATE kernels SET arch = 'z80'"), "damaged"),
    ],
)
def test_a_spoiled_pack_is_told_in_one_sentence_and_torch_serves(
    pack: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(pack)
    weight = torch.ones(2, 4, 6)
    with pytest.warns(TilewrightWarning, match=said) as caught:
        call = prepare(weight, stage="plain", options=ServeOptions(database=pack))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    out = call(torch.ones(3, 6), torch.tensor([0, 1, 3], dtype=torch.int32), torch.empty(3, 4))
    assert out.unique().tolist() == [6.0]


@pytest.mark.parametrize("spoil", [truncated, overwritten, no_database, foreign, changed("PRAGMA user_version = 99")])
def test_commands_refuse_a_spoiled_pack(
    pack: Path, spoil: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(pack)
    for words in (["show"], ["pack", str(pack.with_name("again.pack"))]):
        assert main([*words, "--db", str(pack)]) != 0
        err = capsys.readouterr().err
        assert err.startswith("tune: ")
        assert len(err.splitlines()) == 1
    assert [path.name for path in pack.parent.iterdir()] == [pack.name]


def test_a_pack_of_another_device_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    forget_warnings()
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, fresh_kernel())], device_key="x86_64/Other-9/1k")
    assert main(["pack", str(tmp_path / "served.pack"), "--db", str(database)]) == 0
    with pytest.warns(TilewrightWarning, match=r"made on other devices \(x86_64/Other-9/1k\)"):
        prepare(torch.ones(2, 4, 6), stage="plain", options=ServeOptions(database=tmp_path / "served.pack"))


def test_a_pack_without_a_plan_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o700)
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, fresh_kernel())])
    assert main(["pack", str(tmp_path / "served.pack"), "--db", str(database), "--model", "nobody"]) != 0
    assert "holds no such plan; it holds: moe_gemm of test-model" in capsys.readouterr().err
    assert not (tmp_path / "served.pack").exists()
