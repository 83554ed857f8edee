"""What GPU binaries came to, and what speaks against one that nobody timed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tilewright.codegen.backends.base import BuiltFile
from tilewright.codegen.backends.binaries.facts import EntryFacts
from tilewright.codegen.backends.binaries.instructions import (
    InstructionMix,
    disassemble,
    read_amdgcn,
    read_sass,
    streamed_lines,
)


class Inspector:
    """Reads the instructions of GPU binaries: once of equal ones, since that takes a disassembler."""

    def __init__(self) -> None:
        self._known: dict[str, InstructionMix] = {}

    def instructions(self, source: str, files: Sequence[BuiltFile]) -> tuple[InstructionMix, ...]:
        """Of each of ``files``, the binaries of a kernel with the text ``source``.

        Raises:
            TilewrightError: when a binary cannot be disassembled.

        """
        streamed = streamed_lines(source)
        return tuple(self._mix(file, streamed) for file in files)

    def _mix(self, file: BuiltFile, streamed: frozenset[int]) -> InstructionMix:
        binary = file.path.read_bytes()
        key = hashlib.sha256(binary + repr(sorted(streamed)).encode()).hexdigest()
        if key not in self._known:
            if file.kind == "cubin":
                mix = read_sass(disassemble(binary, lines=True), streamed)
            else:
                mix = read_amdgcn(file.path.with_suffix(".amdgcn").read_text(), streamed)
            self._known[key] = mix
        return self._known[key]


def spills(facts: Sequence[EntryFacts]) -> bool:
    """Whether a launch of a kernel keeps registers in memory."""
    return any(each.spills for each in facts)


def performance_warnings(facts: Sequence[EntryFacts], mixes: Sequence[InstructionMix]) -> tuple[str, ...]:
    """What a measurement would have to excuse, each in a few words; empty for a clean kernel."""
    narrow = [mix.streamed_load_bytes for mix in mixes if not mix.wide and mix.streamed_load_bytes]
    return (
        *(("spills registers",) if spills(facts) else ()),
        *((f"loads {min(narrow)} bytes at a time",) if narrow else ()),
    )
