"""Cubins without code: entries with the parameters that a test wants, for a driver that runs none."""

from __future__ import annotations

import struct
from collections.abc import Sequence

MACHINE = 190  # EM_CUDA
REGISTERS, PARAMETER, BANK_BYTES = 0x2F, 0x17, 0x19
SHARED_TABLE, FUNCTION = 3, 2


def make_cubin(entry: str, parameter_bytes: Sequence[int], *, sm: int = 90) -> bytes:
    """A cubin of the form of CUDA 12 for ``sm``, whose parameters lie one after the other, each aligned to its size."""
    offsets, end = [], 0
    for size in parameter_bytes:
        alignment = min(size, 64)
        offsets.append(-(-end // alignment) * alignment)
        end = offsets[-1] + size
    info = b"".join(
        struct.pack("<BBHIHHI", 4, PARAMETER, 12, 0, ordinal, offset, size << 18)
        for ordinal, (offset, size) in enumerate(zip(offsets, parameter_bytes, strict=True))
    ) + struct.pack("<BBH", 3, BANK_BYTES, end)
    names = b"\0" + entry.encode() + b"\0"
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, FUNCTION, 0, 1, 0, 0)
    registers = struct.pack("<BBHII", 4, REGISTERS, 8, 1, 32)
    parts = {
        "": (0, b"", 0),
        f".text.{entry}": (1, b"", 0),
        ".symtab": (2, symbols, 3),
        ".strtab": (SHARED_TABLE, names, 0),
        ".nv.info": (0x70000000, registers, 0),
        f".nv.info.{entry}": (0x70000000, info, 0),
    }
    titles = b"".join(name.encode() + b"\0" for name in (*parts, ".shstrtab"))
    parts[".shstrtab"] = (SHARED_TABLE, titles, 0)
    body, headers, title = b"", b"", 0
    for name, (kind, data, link) in parts.items():
        headers += struct.pack("<IIQQQQIIQQ", title, kind, 0, 0, 64 + len(body), len(data), link, 0, 1, 0)
        body += data + bytes(-len(data) % 8)
        title += len(name) + 1
    ident = b"\x7fELF\x02\x01\x01\x33\x07" + bytes(7)
    head = struct.pack(
        "<HHIQQQIHHHHHH", 2, MACHINE, 1, 0, 0, 64 + len(body), sm, 64, 0, 0, 64, len(parts), len(parts) - 1
    )
    return ident + head + body + headers
