"""What a shared object exports, read from its bytes before the system's loader sees them.

The loader trusts what it is given: a file that ends before its segments do ends the process. And it finds a name in
every library that an object was linked to, so that an "entry" of ``abort`` would be called.
"""

from __future__ import annotations

import platform
import struct

_IDENTITY = b"\x7fELF\x02\x01\x01"
"""64 bits, little-endian, version 1."""
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHARED_OBJECT = 3
_MACHINES = {"x86_64": 62, "aarch64": 183, "arm64": 183}
_LOADED = 1
_DYNAMIC_SYMBOLS = 11
_FUNCTION = 2
_GLOBAL_OR_WEAK = (1, 2)
_MOST_SYMBOLS = 1 << 16
_MOST_BYTES = 1 << 30
"""Of one segment in memory."""


def exported_functions(data: bytes) -> frozenset[str]:
    """Names of the functions that are defined in the shared object ``data``, and seen from outside.

    Raises:
        ValueError: says why these bytes are no shared object of this machine, or not all of one.

    """
    if not data.startswith(_IDENTITY):
        raise ValueError("it is no 64-bit little-endian ELF file")
    try:
        return _read(data)
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError("its tables lie beyond its end") from error


def _read(data: bytes) -> frozenset[str]:
    kind, machine, _, _, segments_at, sections_at, _, _, segment_bytes, segments, section_bytes, sections, _ = (
        _HEADER.unpack_from(data)
    )
    if kind != _SHARED_OBJECT:
        raise ValueError("it is no shared object")
    if machine != _MACHINES.get(platform.machine(), machine):
        raise ValueError(f"it is for another machine than {platform.machine()}")
    if segment_bytes != _SEGMENT.size or section_bytes != _SECTION.size:
        raise ValueError("its tables have entries of another size")
    loads = 0
    for index in range(segments):
        kind, _, offset, address, _, in_file, in_memory, alignment = _SEGMENT.unpack_from(
            data, segments_at + index * segment_bytes
        )
        if offset + in_file > len(data) or (kind == _LOADED and in_file > in_memory):
            raise ValueError("a part of it is missing")
        if kind == _LOADED:
            loads += 1
            if in_memory > _MOST_BYTES or alignment > _MOST_BYTES or (alignment and (address - offset) % alignment):
                raise ValueError("a part of it cannot be put into memory")
    if not loads:
        raise ValueError("it has nothing to load")
    headers = [_SECTION.unpack_from(data, sections_at + index * section_bytes) for index in range(sections)]
    names: set[str] = set()
    for _, kind, _, _, offset, size, link, *_ in headers:
        if kind == _DYNAMIC_SYMBOLS:
            strings = headers[link][4]
            for index in range(min(size // _SYMBOL.size, _MOST_SYMBOLS)):
                name, info, _, section, _, _ = _SYMBOL.unpack_from(data, offset + index * _SYMBOL.size)
                if section and info & 0xF == _FUNCTION and info >> 4 in _GLOBAL_OR_WEAK:
                    begin = strings + name
                    names.add(data[begin : data.index(b"\0", begin)].decode(errors="replace"))
    return frozenset(names)
