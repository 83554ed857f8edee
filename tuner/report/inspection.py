"""What GPU binaries came to, and what speaks against one that nobody timed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tilewright.codegen.backends.base import Backend, BuiltFile
from tilewright.codegen.backends.binaries.facts import EntryFacts
from tilewright.codegen.backends.binaries.instructions import InstructionMix, streamed_lines


class Inspector:
    """Reads the instructions of binaries: once of equal ones, since that takes a disassembler."""

    def __init__(self) -> None:
        self._known: dict[str, InstructionMix] = {}

    def instructions(self, backend: Backend, source: str, files: Sequence[BuiltFile]) -> tuple[InstructionMix, ...]:
        """Of each of ``files``, the binaries that ``backend`` made of the text ``source``.

        Raises:
            TilewrightError: when a binary cannot be disassembled.

        """
        streamed = repr(sorted(streamed_lines(source)))
        return tuple(self._mix(backend, source, file, streamed) for file in files)

    def _mix(self, backend: Backend, source: str, file: BuiltFile, streamed: str) -> InstructionMix:
        key = hashlib.sha256(file.path.read_bytes() + streamed.encode()).hexdigest()
        if key not in self._known:
            self._known[key] = backend.instructions(file, source)
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
