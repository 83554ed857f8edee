"""Signatures of packs: who vouches for every byte of one. A seal tells damage; a signature tells whose the file is.

A signature lies beside its file. It names this format, the file's size and its sha512, and signs these lines with
Ed25519, so that a file of any size is read once and in pieces. Keys are PEM files, as openssl makes them. Only where
a key is named is the package `cryptography` needed.
"""

import base64
import binascii
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.errors import TilewrightError
from tilewright.trust import UntrustedFile, find_stranger

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SUFFIX = ".sig"
"""Of the name of a signature, behind the whole name of its file."""

_FORMAT = "tilewright pack signature 1"
_TEXT = re.compile(
    rf"(?P<signed>{_FORMAT}\nbytes: (?P<bytes>\d{{1,18}})\nsha512: (?P<sha512>[0-9a-f]{{128}})\n)"
    r"ed25519: (?P<signature>[A-Za-z0-9+/]{86}==)\n"
)
_MADE_BY = {
    "private": "openssl genpkey -algorithm ed25519 -out key.pem",
    "public": "openssl pkey -in key.pem -pubout -out key.pub.pem",
}
_LARGEST_SIGNATURE_BYTES = 4096
_LARGEST_KEY_BYTES = 1 << 16

_verified: set[tuple[bytes, Path, tuple[int, ...]]] = set()
"""Key, file and state of what was found rightly signed: only this user can change such a file, and it would show."""


class BadSignature(UntrustedFile):
    """A file is not signed by the key that was named, or is not what was signed."""


def signature_path(path: Path) -> Path:
    """Where the signature of ``path`` lies."""
    return path.with_name(path.name + SUFFIX)


def signature_of(path: Path, key: Path) -> str:
    """Sign the bytes of ``path`` with the private key in the file ``key``; returns the signature's text.

    Raises:
        TilewrightError: when the key cannot be used, or others can read it.
        OSError: when ``path`` cannot be read.

    """
    private = _private_key(key)
    signed = _signed_text(*_size_and_hash(path))
    return f"{signed}ed25519: {base64.b64encode(private.sign(signed.encode())).decode()}\n"


def require_signed(path: Path, key: Path) -> None:
    """Refuse a file that is not signed by the public key in the file ``key``; the whole of it is read the first time.

    ``path`` must be one that nobody else can write (see :func:`check_private`), for it is opened again to be read.

    Raises:
        BadSignature: says what does not fit.
        TilewrightError: when the key cannot be used.
        OSError: when ``path`` cannot be read.

    """
    public = _public_key(key)
    known = (public.public_bytes_raw(), path, _state(path))
    if known in _verified:
        return
    beside = signature_path(path)
    try:
        text = _limited(beside, _LARGEST_SIGNATURE_BYTES).decode("ascii")
    except FileNotFoundError as error:
        raise BadSignature(
            f"{path} is not signed: there is no {beside.name} beside it; name a pack that is signed by the key {key}, "
            "or no key"
        ) from error
    except (OSError, ValueError) as error:
        raise BadSignature(
            f"{beside} cannot be read as a signature; ask for the pack and its signature anew"
        ) from error
    found = _TEXT.fullmatch(text)
    if found is None:
        raise BadSignature(
            f"{beside} is no signature of a pack, or is cut off; ask for the pack and its signature anew"
        )
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(base64.b64decode(found["signature"], validate=True), found["signed"].encode())
    except (InvalidSignature, binascii.Error) as error:
        raise BadSignature(f"{path} is not signed by the key {key}; do not use it, or name the right key") from error
    size, digest = _size_and_hash(path)
    if (size, digest) != (int(found["bytes"]), found["sha512"]):
        how = "its bytes are others" if size == int(found["bytes"]) else f"of {found['bytes']} bytes it has {size}"
        raise BadSignature(f"{path} is not the file that was signed: {how}; do not use it, ask for the pack anew")
    if _state(path) == known[2]:
        _verified.add(known)


def _signed_text(size: int, digest: str) -> str:
    return f"{_FORMAT}\nbytes: {size}\nsha512: {digest}\n"


def _size_and_hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").hexdigest()
        return file.tell(), digest


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _private_key(path: Path) -> "Ed25519PrivateKey":
    key = _loaded_key(path, "private")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TilewrightError(f"the key {path} can be read by others; run `chmod 600 {path}`, or make a new one")
    return key


def _public_key(path: Path) -> "Ed25519PublicKey":
    key = _loaded_key(path, "public")
    if found := find_stranger(Path(os.path.realpath(path))):
        raise UntrustedFile(
            f"{found.path} {found.how}, so that the key {path} proves nothing; keep keys in a directory of your own"
        )
    return key


def _loaded_key(path: Path, kind: str) -> Any:
    """The key of Ed25519 in a PEM file, of a ``kind`` of :data:`_MADE_BY`."""
    text = _key_text(path)
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ed25519
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ModuleNotFoundError as error:
        raise TilewrightError(
            f"signatures need the package {error.name}; run `pip install 'tilewright[signing]'`"
        ) from error
    key: object
    try:
        key = load_pem_private_key(text, password=None) if kind == "private" else load_pem_public_key(text)
    except TypeError as error:
        raise TilewrightError(f"the key {path} has a passphrase, and none is asked for; name one without") from error
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey if kind == "private" else ed25519.Ed25519PublicKey):
        raise TilewrightError(f"{path} is no {kind} key of Ed25519 in PEM; make one by `{_MADE_BY[kind]}`")
    return key


def _key_text(path: Path) -> bytes:
    try:
        return _limited(path, _LARGEST_KEY_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TilewrightError(f"the key {path} cannot be read: {reason}; name a PEM file") from error


def _limited(path: Path, most: int) -> bytes:
    # Not to wait for whoever writes to a pipe.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError("it is too long")
    return data
