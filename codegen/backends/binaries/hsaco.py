"""What an hsaco says of its one entry point: the metadata note of AMDGPU code objects, which is MessagePack.

The keys are those of LLVM's "User Guide for AMDGPU Backend", section "Code Object V3-V5 Metadata".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgpack

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
        ValueError: when the file says nothing of ``entry``, or what it says is damaged.

    """
    found = sections(binary)
    if ".note" not in found:
        raise ValueError("the hsaco has no metadata")
    kernels = _field(_metadata(found[".note"].data), "amdhsa.kernels", list)
    kernel = next((each for each in kernels if isinstance(each, dict) and each.get(".name") == entry), None)
    if kernel is None:
        raise ValueError(f"the hsaco has no entry {entry}")
    arguments = _field(kernel, ".args", list)
    explicit = [each for each in arguments if not _field(each, ".value_kind", str).startswith("hidden_")]
    placed = sorted((_field(each, ".offset", int), _field(each, ".size", int)) for each in explicit)
    # The count of vector registers is the one that is allocated: accumulators are within it since gfx90a.
    return HsacoFacts(
        registers=_field(kernel, ".vgpr_count", int),
        spilled_registers=_field(kernel, ".vgpr_spill_count", int),
        static_smem_bytes=_field(kernel, ".group_segment_fixed_size", int),
        stack_bytes=_field(kernel, ".private_segment_fixed_size", int),
        parameter_bytes=tuple(size for _, size in placed),
    )


def _metadata(note: bytes) -> object:
    try:
        name_bytes, size, _ = _NOTE_HEADER.unpack_from(note)
        begin = _NOTE_HEADER.size + -(-name_bytes // 4) * 4
        return msgpack.unpackb(note[begin : begin + size], strict_map_key=False)
    # Not all that msgpack raises are ValueErrors: keys that cannot be hashed, for example.
    except (struct.error, msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the metadata of the hsaco are damaged: {str(error) or type(error).__name__}") from error


def _field(data: object, name: str, kind: type[Any]) -> Any:
    value = data.get(name) if isinstance(data, dict) else None
    if type(value) is not kind:
        raise ValueError(f"the metadata of the hsaco are damaged: there is no {name}")
    return value
