"""Sections of 64-bit little-endian ELF files: the container of cubin and hsaco binaries."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_MAGIC = b"\x7fELF\x02\x01"
_HEADER_SECTIONS = struct.Struct("<QIHHHHHH")
"""From byte 40: section table's offset, flags, sizes and counts (System V ABI, "ELF Header")."""
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NOBITS = 8


class NotElfError(ValueError):
    """The bytes are no ELF file that this module reads."""


@dataclass(frozen=True)
class Section:
    """One section; ``data`` is empty where it only takes space when loaded."""

    name: str
    size: int
    data: bytes


def sections(binary: bytes) -> dict[str, Section]:
    """Sections by name; of several of one name the first.

    Raises:
        NotElfError: for bytes that are no such file, or that end too early.

    """
    if not binary.startswith(_MAGIC):
        raise NotElfError("no 64-bit little-endian ELF file")
    try:
        table, _, _, _, _, entry_bytes, count, names_index = _HEADER_SECTIONS.unpack_from(binary, 40)
        headers = [_SECTION.unpack_from(binary, table + index * entry_bytes) for index in range(count)]
        names_at = headers[names_index][4]
        found: dict[str, Section] = {}
        for name_at, kind, _, _, offset, size, *_ in headers:
            begin = names_at + name_at
            name = binary[begin : binary.index(b"\0", begin)].decode()
            data = b"" if kind == _NOBITS else binary[offset : offset + size]
            if kind != _NOBITS and len(data) < size:
                raise NotElfError(f"section {name} ends beyond the file")
            found.setdefault(name, Section(name, size, data))
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise NotElfError(f"a damaged ELF file: {error}") from error
    return found
