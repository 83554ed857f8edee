"""What a cubin says of its one entry point.

The attributes of ``.nv.info`` sections are not documented by NVIDIA; their numbers and layouts were read off the output
of ``cuobjdump -elf`` for CUDA 12.8 to 13.0, and a test holds them against it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tilewright.codegen.backends.binaries.elf import sections

_RESERVED_SMEM_BYTES = 1 << 10
_VALUE_FORMAT = 0x04
"""An attribute with a size and as many bytes; others hold two bytes in its place."""
_REGISTER_COUNT = 0x2F
_FRAME_SIZE = 0x11
_PARAMETER = 0x17
_PARAMETER_SIZE_SHIFT = 18
_REQUIRED_BLOCK = 0x10
_CLUSTER = 0x3D

_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class CubinFacts:
    """As read from the file."""

    registers: int
    static_smem_bytes: int
    stack_bytes: int
    parameter_bytes: tuple[int, ...]
    block: tuple[int, int, int] | None
    """Threads along x, y, z that a launch must have; None where any block will do."""
    cluster: tuple[int, int, int] | None
    """Blocks of a cluster along x, y, z; None where the launch says."""

    def require_launch(self, entry: str, *, threads: int, cluster: int) -> None:
        """Refuse a binary that was compiled for another block or cluster, both of them along x.

        Raises:
            ValueError: names the entry and both.

        """
        wanted = (("threads in a block", self.block, threads), ("blocks in a cluster", self.cluster, cluster))
        for what, compiled, told in wanted:
            if compiled is not None and compiled != (told, 1, 1):
                counts = " x ".join(map(str, compiled))
                raise ValueError(f"the binary of {entry} wants {counts} {what}, and the compiler's metadata say {told}")


def read_cubin(binary: bytes, entry: str) -> CubinFacts:
    """Facts of ``entry``, the only kernel of ``binary``.

    Raises:
        NotElfError: for bytes that are no ELF file.
        ValueError: when the file says nothing of ``entry``.

    """
    found = sections(binary)
    if f".text.{entry}" not in found:
        raise ValueError(f"the cubin has no entry {entry}")
    symbol = _symbol_index(found[".symtab"].data, found[".strtab"].data, entry)
    registers = frame = None
    for attribute, value in _attributes(found[".nv.info"].data):
        if attribute in (_REGISTER_COUNT, _FRAME_SIZE) and len(value) >= 8:
            of, number = struct.unpack_from("<II", value)
            if of == symbol and attribute == _REGISTER_COUNT:
                registers = number
            elif of == symbol:
                frame = number
    if registers is None or frame is None:
        raise ValueError(f"the cubin does not tell the registers and the stack of {entry}")
    parameters, dimensions = {}, {}
    for attribute, value in _attributes(found[f".nv.info.{entry}"].data):
        if attribute == _PARAMETER:
            _, ordinal, _, packed = struct.unpack_from("<IHHI", value)
            parameters[ordinal] = packed >> _PARAMETER_SIZE_SHIFT
        elif attribute in (_REQUIRED_BLOCK, _CLUSTER):
            dimensions[attribute] = struct.unpack_from("<III", value)
    smem = found[f".nv.shared.{entry}"].size if f".nv.shared.{entry}" in found else 0
    if ".nv.shared.reserved.0" in found:  # counted in, from 9.0 on
        smem = max(0, smem - _RESERVED_SMEM_BYTES)
    return CubinFacts(
        registers,
        smem,
        frame,
        tuple(parameters[index] for index in sorted(parameters)),
        dimensions.get(_REQUIRED_BLOCK),
        dimensions.get(_CLUSTER),
    )


def read_spills(log: str) -> tuple[int, int]:
    """Bytes of spill stores and of spill loads from the verbose log of ptxas, at the most of its functions.

    Raises:
        ValueError: when the log does not tell.

    """
    found = _SPILLS.findall(log)
    if not found:
        raise ValueError("ptxas did not tell what it spilled")
    return max(int(stores) for _, stores, _ in found), max(int(loads) for _, _, loads in found)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == _VALUE_FORMAT:
            yield attribute, data[at : at + size]
            at += size


def _symbol_index(symbols: bytes, names: bytes, wanted: str) -> int:
    """Index of a symbol by name."""
    for index in range(len(symbols) // 24):
        (name_at,) = struct.unpack_from("<I", symbols, 24 * index)
        if names[name_at : names.index(b"\0", name_at)].decode() == wanted:
            kind = symbols[24 * index + 4] & 0xF
            if kind == 2:  # a function
                return index
    raise ValueError(f"the cubin has no function {wanted}")
