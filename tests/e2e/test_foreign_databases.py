"""Databases and packs that somebody else wrote: none of their code runs, and none of their text steers a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tuning_db_samples import fill, plan

from tilewright.codegen.backends.registry import find_backend
from tilewright.codegen.hardware.archs import find_arch
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.rendering import render
from tilewright.codegen.space import Config
from tilewright.errors import TilewrightError
from tilewright.tuner.cli import main
from tilewright.tuning_db.records import ArtifactRecord, DeviceRecord, KernelRecord
from tilewright.tuning_db.store import Store

OP = find_op("moe_gemm")
SIGNATURE = OP.signature_from_dict(
    {"stage": "up", "experts": 4, "n": 64, "k": 64, **dict.fromkeys(("x_dtype", "w_dtype", "out_dtype"), "bf16")}
)
READING = ["show", "compare", "export", "pack", "cost"]


def arguments_of(command: str, tmp_path: Path) -> list[str]:
    more = {
        "export": [str(tmp_path / "studies.log")],
        "pack": [str(tmp_path / "new.pack")],
        "cost": ["--model", "mixtral-8x7b", "--arch", "sm_90", "--price", "1"],
    }
    return [command, *more.get(command, [])]


def gpu_kernel(arch_name: str, key: str) -> KernelRecord:
    """A kernel as `tune` would store it, but for its binary."""
    arch = find_arch(arch_name)
    config = OP.space(SIGNATURE, arch)[0]
    template = OP.template(config)
    source = render(template, SIGNATURE, config, arch)
    with_toolchain = find_backend("triton").builder(arch)
    try:
        toolchain = with_toolchain.toolchain
    finally:
        with_toolchain.close()
    return KernelRecord(
        key=key * 24,
        op="moe_gemm",
        signature_key=SIGNATURE.key,
        signature=SIGNATURE.to_dict(),
        template=template.name,
        config=dict(config),
        arch=arch_name,
        source=source,
        recipe={},
        toolchain=toolchain,
        facts={},
        artifacts=(),
        checked="compiled",
    )


def with_code(kernel: KernelRecord, code: str) -> KernelRecord:
    return replace(kernel, source=f"{kernel.source}\n{code}\n")


def with_knob(kernel: KernelRecord, code: str) -> KernelRecord:
    """A knob whose value is code, and the source that our own template makes of it."""
    arch = find_arch(kernel.arch)
    honest = Config(kernel.config)
    for name, value in honest.items():
        changed = Config({**honest, name: f"{value}\n{code}\n"})
        try:
            source = render(OP.template(honest), SIGNATURE, changed, arch)
        except (TilewrightError, TypeError, ValueError, KeyError, StopIteration):
            continue
        if f"\n{code}\n" in source:
            return replace(kernel, config=dict(changed), source=source)
    return replace(kernel, config={**honest, "num_stages": f"3\n{code}\n"})


@pytest.mark.parametrize("change", [with_code, with_knob])
@pytest.mark.parametrize(("arch", "option", "kind"), [("sm_90", "--ir", "cubin"), ("gfx942", "--disassembly", "hsaco")])
def test_comparing_kernels_runs_nothing_that_a_database_holds(
    change: Callable[[KernelRecord, str], KernelRecord],
    arch: str,
    option: str,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    canary = tmp_path / "canary"
    binary = ArtifactRecord.from_bytes(b"\x7fELF no more", kind=kind, abi_version=1)
    path = tmp_path / "team.db"
    with Store.open(path) as store:
        for key in "ab":
            kernel = change(gpu_kernel(arch, key), f"open({str(canary)!r}, 'w')")
            store.add_kernel(replace(kernel, artifacts=(binary.checksum,)), [binary])
    assert main(["compare", "a" * 24, "b" * 24, option, "--db", str(path)]) == 1
    assert not canary.exists()
    said = capsys.readouterr().err
    assert said.startswith("tune: the source of kernel aaaaaaaa is not what this tilewright's template makes of its")
    assert len(said.splitlines()) == 1


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """One with a row of every kind, in a folder of its own."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    with Store.open(folder / "tuning.db") as store:
        fill(store)
    return folder / "tuning.db"


def writable_file(database: Path) -> Path:
    database.chmod(0o666)
    return database


def writable_folder(database: Path) -> Path:
    database.parent.chmod(0o777)
    return database.parent


def writable_grandparent(database: Path) -> Path:
    database.parent.parent.chmod(0o777)
    return database.parent.parent


def writable_log(database: Path) -> Path:
    beside = database.with_name("tuning.db-wal")
    beside.touch()
    beside.chmod(0o666)
    return beside


def anothers_file(database: Path) -> Path:
    os.chown(database, 12345, -1)
    return database


def anothers_folder(database: Path) -> Path:
    os.chown(database.parent, 12345, -1)
    return database.parent


def anothers_grandparent(database: Path) -> Path:
    os.chown(database.parent.parent, 12345, -1)
    return database.parent.parent


ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
SPOILED = [
    writable_file,
    writable_folder,
    writable_grandparent,
    writable_log,
    *(pytest.param(each, marks=ROOT) for each in (anothers_file, anothers_folder, anothers_grandparent)),
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_every_command_refuses_what_others_could_have_written(
    spoil: Callable[[Path], Path], database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in database.parent.iterdir()}
    try:
        culprit = spoil(database)
        for command in READING:
            code = main([*arguments_of(command, tmp_path), "--db", str(database)])
            said = capsys.readouterr().err
            assert code == 1, command
            assert re.match(rf"tune: {culprit} (belongs to another user|can be written by others)", said), said
            assert "copy the database" not in said
            assert len(said.splitlines()) == 1
        for opening in (Store.open, Store.open_read_only):
            with pytest.raises(TilewrightError, match="a database is code"):
                opening(database)
    finally:
        if os.geteuid() == 0:
            os.chown(tmp_path, 0, -1)
        tmp_path.chmod(0o700)
    after = {path: path.read_bytes() for path in database.parent.iterdir() if path in before}
    assert after == before
    assert not (tmp_path / "new.pack").exists()


def test_no_database_is_made_where_others_could_replace_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(TilewrightError, match="name a file in a directory of your own"):
        Store.open(tmp_path / "new.db")
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o700)


def test_a_sticky_folder_above_is_no_danger_and_a_sticky_folder_itself_is(database: Path) -> None:
    above = database.parent.parent
    above.chmod(0o1777)
    Store.open_read_only(database).close()
    database.parent.chmod(0o1777)
    with pytest.raises(TilewrightError, match="written by others"):
        Store.open_read_only(database)
    above.chmod(0o700)


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[bold red]x[/]"


@pytest.mark.parametrize(
    "words", [["show"], ["show", "cc"], ["compare", "cc", "dd"], ["pack", "new.pack", "--model", "none"]]
)
def test_no_text_of_a_database_steers_a_terminal(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Store.open("team.db") as store:
        store.put_device(DeviceRecord(ESCAPES, ESCAPES, ESCAPES))
        honest = gpu_kernel("sm_90", "c")
        for key in ("c", "d"):
            facts = {ESCAPES: ESCAPES, "artifact_bytes": f"{key}{ESCAPES}"}
            kernel = replace(honest, key=key * 64, toolchain=ESCAPES, source=f"{key}{ESCAPES}", facts=facts)
            store.add_kernel(kernel, [])
        changes = {"model": ESCAPES, "layout": ESCAPES, "device_key": ESCAPES, "signature": SIGNATURE.to_dict()}
        store.put_plan(plan("c" * 64, **changes, precision=ESCAPES, error=0.01))
    assert main([*words, "--db", "team.db"]) == int(words[0] == "pack")
    said = "".join(capsys.readouterr())
    assert "owned" in said
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", said)


def test_errors_show_neither_control_characters_nor_passwords() -> None:
    said = str(TilewrightError(f"{ESCAPES} of postgresql://me:secret@host/db?password=secret&x=1 failed"))
    assert "secret" not in said
    assert said.isprintable()
    assert "postgresql://me:***@host/db?password=***&x=1" in said


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cret@localhost:1/tuning",
        "postgresql://me:s3c@ret@localhost:1/tuning",
        "postgresql://me:s3cret@localhost:port/tuning",
        "postgresql+psycopg://localhost:1/tuning?user=me&password=s3cret",
        "sqlite:///tuning.db?password=s3cret",
        "mysql://me:s3cret@localhost/tuning",
        "nonsense://me:s3cret@",
    ],
)
def test_no_message_shows_a_password(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", "--db", url]) == 1
    problem = ["--arch", "native", "--op", "moe_gemm", "--problem", "stage=plain,experts=2,n=16,k=16"]
    assert main([*problem, "--trials", "1", "--db", str(tmp_path / "t.db"), "--study", url]) == 1
    said = "".join(capsys.readouterr())
    assert "s3c" not in said
    assert "ret@" not in said


def test_a_run_is_recorded_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.tuner.campaign.campaign import recorded_command

    monkeypatch.setattr(
        sys, "argv", ["tune", "--db=postgresql://me:s3cret@host/db", "--study", "postgresql://me:s3cret@host/x"]
    )
    assert recorded_command() == "tune '--db=postgresql://me:***@host/db' --study 'postgresql://me:***@host/x'"
