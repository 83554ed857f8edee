"""What an hsaco says of its one entry point: the metadata note of AMDGPU code objects.

The keys are those of LLVM's "User Guide for AMDGPU Backend", section "Code Object V3-V5 Metadata"; the note is in
MessagePack (github.com/msgpack/msgpack, specification), of which it uses few types.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.backends.binaries.elf import sections

_NOTE_HEADER = struct.Struct("<III")


@dataclass(frozen=True)
class HsacoFacts:
    """As read from the file."""

    registers: int
    """Vector registers and accumulators of a lane, which share one file."""
    spilled_registers: int
    static_smem_bytes: int
    stack_bytes: int
    parameter_bytes: tuple[int, ...]


def read_hsaco(binary: bytes, entry: str) -> HsacoFacts:
    """Facts of ``entry``.

    Raises:
        NotElfError: for bytes that are no ELF file.
        ValueError: when the file says nothing of ``entry``.

    """
    found = sections(binary)
    if ".note" not in found:
        raise ValueError("the hsaco has no metadata")
    note = found[".note"].data
    name_bytes, size, _ = _NOTE_HEADER.unpack_from(note)
    begin = _NOTE_HEADER.size + -(-name_bytes // 4) * 4
    metadata, _ = _unpack(note[begin : begin + size], 0)
    kernels: list[Mapping[str, Any]] = metadata["amdhsa.kernels"]
    kernel = next((each for each in kernels if each[".name"] == entry), None)
    if kernel is None:
        raise ValueError(f"the hsaco has no entry {entry}")
    explicit = [each for each in kernel[".args"] if not each[".value_kind"].startswith("hidden_")]
    # The count of vector registers is the one that is allocated: accumulators are within it since gfx90a.
    return HsacoFacts(
        registers=kernel[".vgpr_count"],
        spilled_registers=kernel[".vgpr_spill_count"],
        static_smem_bytes=kernel[".group_segment_fixed_size"],
        stack_bytes=kernel[".private_segment_fixed_size"],
        parameter_bytes=tuple(each[".size"] for each in sorted(explicit, key=lambda each: each[".offset"])),
    )


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    """The MessagePack object at ``at``, and where the next one begins."""
    kind = data[at]
    at += 1
    if kind < 0x80:
        return kind, at
    if kind < 0x90:
        return _unpack_map(data, at, kind & 0x0F)
    if kind < 0xA0:
        return _unpack_list(data, at, kind & 0x0F)
    if kind < 0xC0:
        return _unpack_text(data, at, kind & 0x1F)
    if kind in (0xC2, 0xC3):
        return kind == 0xC3, at
    if kind >= 0xE0:
        return kind - 0x100, at
    numbers = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
    if kind in numbers:
        return _unpack_number(data, at, numbers[kind])
    lengths = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
    if kind not in lengths:
        raise ValueError(f"metadata of an unknown type 0x{kind:02x}")
    length, at = _unpack_number(data, at, lengths[kind])
    if kind <= 0xDB:
        return _unpack_text(data, at, length)
    return (_unpack_list if kind <= 0xDD else _unpack_map)(data, at, length)


def _unpack_number(data: bytes, at: int, layout: str) -> tuple[int, int]:
    return struct.unpack_from(layout, data, at)[0], at + struct.calcsize(layout)


def _unpack_text(data: bytes, at: int, length: int) -> tuple[str, int]:
    return data[at : at + length].decode(), at + length


def _unpack_list(data: bytes, at: int, length: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(length):
        item, at = _unpack(data, at)
        items.append(item)
    return items, at


def _unpack_map(data: bytes, at: int, length: int) -> tuple[dict[Any, Any], int]:
    items = {}
    for _ in range(length):
        key, at = _unpack(data, at)
        items[key], at = _unpack(data, at)
    return items, at
