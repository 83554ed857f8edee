"""Signed packs: what is served is what the holder of the key has signed, to the last byte."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tuning_db_samples import fill

from tilewright.errors import TilewrightError
from tilewright.runtime import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.tuner.cli import main
from tilewright.tuning_db.reader import BadSignature, Reader
from tilewright.tuning_db.store import Store

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")

SIGNATURE = ("moe_gemm", "signature-1")


def write_keys(folder: Path, name: str, key: object = None, **encryption: object) -> Path:
    """Write NAME.pem and NAME.pub.pem; returns the first."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8
    secret = encryption.get("with_", serialization.NoEncryption())
    private = key.private_bytes(serialization.Encoding.PEM, form, secret)  # type: ignore[attr-defined]
    public = key.public_key().public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path = folder / f"{name}.pem"
    path.touch(mode=0o600)
    path.write_bytes(private)
    (folder / f"{name}.pub.pem").write_bytes(public)
    return path


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database, two pairs of keys, and a pack that one of them has signed."""
    folder = tmp_path_factory.mktemp("signed")
    with Store.open(folder / "tuning.db") as store:
        fill(store)
    write_keys(folder, "key")
    write_keys(folder, "other")
    sign = ["--sign", str(folder / "key.pem")]
    assert main(["pack", str(folder / "served.pack"), *sign, "--db", str(folder / "tuning.db")]) == 0
    return folder


@pytest.fixture
def folder(signed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    shutil.copytree(signed, tmp_path / "deployed")
    return tmp_path / "deployed"


def read(folder: Path, key: str = "key") -> Reader:
    return Reader.open(folder / "served.pack", verify_key=folder / f"{key}.pub.pem")


def test_a_signed_pack_is_read_by_everything_that_is_told_the_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = read(folder)
    assert reader.plans_for(*SIGNATURE)
    assert reader.plans_for(*SIGNATURE)
    words = ["pack", str(folder / "again.pack"), "--db", str(folder / "served.pack")]
    assert main([*words, "--verify", str(folder / "key.pub.pem")]) == 0
    monkeypatch.setenv("TILEWRIGHT_VERIFY_KEY", str(folder / "key.pub.pem"))
    assert Reader.open(folder / "served.pack").plans_for(*SIGNATURE)
    with pytest.raises(BadSignature, match=r"again.pack is not signed: there is no again.pack.sig beside it"):
        Reader.open(folder / "again.pack")
    (folder / "again.pack").unlink()
    assert main(words) == 0
    monkeypatch.setenv("TILEWRIGHT_VERIFY_KEY", str(folder / "other.pub.pem"))
    capsys.readouterr()
    assert main(["show", "--db", str(folder / "served.pack")]) == 1
    assert "served.pack is not signed by the key" in capsys.readouterr().err


def test_without_a_key_a_signature_says_nothing(folder: Path) -> None:
    (folder / "served.pack.sig").write_text("nonsense")
    assert Reader.open(folder / "served.pack").plans_for(*SIGNATURE)


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_more_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def nothing_left(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("spoil", [one_bit, last_byte, one_more_byte, nothing_left])
def test_a_pack_of_which_a_byte_was_changed_is_refused(folder: Path, spoil: Callable[[Path], None]) -> None:
    reader = read(folder)
    spoil(folder / "served.pack")
    for again in (reader.plans_for, lambda *_: read(folder)):
        with pytest.raises(BadSignature, match=r"served.pack is not the file that was signed"):
            again(*SIGNATURE)


def without_a_signature(path: Path) -> None:
    path.unlink()


def with_garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 300)


def with_too_much(path: Path) -> None:
    path.write_text(path.read_text() * 100)


def with_more_lines(path: Path) -> None:
    path.write_text(f"{path.read_text()}more: 1\n")


def with_another_size(path: Path) -> None:
    path.write_text(path.read_text().replace("bytes: ", "bytes: 1"))


def with_another_hash(path: Path) -> None:
    head, _, tail = path.read_text().partition("sha512: ")
    path.write_text(f"{head}sha512: {'0' * 128}{tail[128:]}")


def with_another_format(path: Path) -> None:
    path.write_text(path.read_text().replace("signature 1", "signature 2"))


def with_another_signature(path: Path) -> None:
    head, _, tail = path.read_text().partition("ed25519: ")
    path.write_text(f"{head}ed25519: {'A' if tail[0] != 'A' else 'B'}{tail[1:]}")


def as_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        without_a_signature,
        with_garbage,
        with_too_much,
        with_more_lines,
        with_another_size,
        with_another_hash,
        with_another_format,
        with_another_signature,
        as_a_pipe,
        as_a_folder,
        last_byte,
        nothing_left,
    ],
)
def test_a_pack_without_a_right_signature_is_refused(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder / "served.pack.sig")
    with pytest.raises(BadSignature, match=r"served.pack") as refusal:
        read(folder)
    assert "\n" not in str(refusal.value)
    assert not is_planned_by(folder)


def is_planned_by(folder: Path) -> bool:
    from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature

    signature = MoeGemmSignature(stage="plain", experts=2, n=4, k=6)
    options = ServeOptions(database=folder / "served.pack", verify_key=folder / "key.pub.pem")
    return is_planned(signature, options)


def test_a_pack_signed_by_another_key_is_refused(folder: Path) -> None:
    with pytest.raises(BadSignature, match=r"served.pack is not signed by the key .*other.pub.pem"):
        read(folder, "other")


def test_what_lies_beside_a_signed_pack_is_no_part_of_it(folder: Path) -> None:
    """A log beside a file changes what SQLite reads of it, though not one of its bytes."""
    with closing(sqlite3.connect(folder / "served.pack", isolation_level=None)) as writer:
        before = (folder / "served.pack").read_bytes()
        writer.execute("PRAGMA journal_mode = WAL")
        wal_mode = (folder / "served.pack").read_bytes()
        writer.execute("DELETE FROM plan_entries")
        writer.execute("DELETE FROM plans")
        log = (folder / "served.pack-wal").read_bytes()
    assert wal_mode != before
    for name, data in (("served.pack", before), ("served.pack-wal", log)):
        (folder / name).write_bytes(data)
    (folder / "served.pack-shm").unlink(missing_ok=True)
    assert read(folder).plans_for(*SIGNATURE)
    with Store.open_read_only(folder / "served.pack", verify_key=folder / "key.pub.pem") as store:
        assert store.plans()


def another_kind(folder: Path) -> Path:
    x25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.x25519")
    return write_keys(folder, "kind", x25519.X25519PrivateKey.generate())


def with_a_passphrase(folder: Path) -> Path:
    return write_keys(folder, "locked", with_=serialization.BestAvailableEncryption(b"secret"))


def readable_by_others(folder: Path) -> Path:
    (folder / "key.pem").chmod(0o644)
    return folder / "key.pem"


def written(data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "made.pem").touch(mode=0o600)
        (folder / "made.pem").write_bytes(data)
        return folder / "made.pem"

    return write


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (another_kind, "is no private key of Ed25519 in PEM; make one by `openssl genpkey"),
        (with_a_passphrase, "has a passphrase"),
        (readable_by_others, "can be read by others; run `chmod 600"),
        (written(b""), "is no private key"),
        (written(b"x" * 100_000), "cannot be read: it is too long"),
        (lambda folder: folder / "key.pub.pem", "is no private key"),
        (lambda folder: folder / "none.pem", "cannot be read: No such file"),
        (lambda folder: folder, "cannot be read: "),
    ],
)
def test_a_key_that_cannot_sign_is_named_and_no_pack_is_made(
    folder: Path, make: Callable[[Path], Path], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pack", str(folder / "new.pack"), "--sign", str(make(folder)), "--db", str(folder / "tuning.db")]
    assert main(words) == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in folder.iterdir() if "new.pack" in path.name] == []


def test_a_key_that_others_could_replace_proves_nothing(folder: Path) -> None:
    (folder / "key.pub.pem").chmod(0o666)
    with pytest.raises(TilewrightError, match=r"so that the key .* proves nothing"):
        read(folder)
    with pytest.raises(TilewrightError, match="is no public key of Ed25519 in PEM; make one by `openssl pkey"):
        Reader.open(folder / "served.pack", verify_key=folder / "key.pem")


def test_neither_a_pack_nor_a_signature_is_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "served.pack.sig").read_text()
    (folder / "served.pack").unlink()
    words = ["pack", str(folder / "served.pack"), "--sign", str(folder / "key.pem"), "--db", str(folder / "tuning.db")]
    assert main(words) == 1
    assert "served.pack.sig exists already" in capsys.readouterr().err
    assert (folder / "served.pack.sig").read_text() == before
    assert not (folder / "served.pack").exists()


def test_a_server_signs_nothing(folder: Path) -> None:
    with pytest.raises(TilewrightError, match=r"postgresql://me:\*\*\*@host/db is none of"):
        Store.open_read_only("postgresql://me:secret@host/db", verify_key=folder / "key.pub.pem")


def test_every_part_of_a_signature_counts(folder: Path) -> None:
    """A hundred places of the signature's text, one letter changed at each."""
    path = folder / "served.pack.sig"
    text = path.read_text()
    for at in itertools.islice(range(0, len(text), max(1, len(text) // 100)), 100):
        path.write_text(f"{text[:at]}{'~' if text[at] != '~' else '-'}{text[at + 1 :]}")
        with pytest.raises(BadSignature):
            read(folder)
