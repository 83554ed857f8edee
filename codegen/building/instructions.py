"""Which instructions a kernel came to: its matrix instructions, and how wide its main loop loads.

Of NVIDIA binaries the disassembly is read (``nvdisasm``, which comes with Triton); of AMD binaries the assembly that
they were made from.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tilewright.codegen.building.triton_toolchain import bundled_tool
from tilewright.errors import TilewrightError

_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
"""Bytes of a thread's load by suffix of the instruction; 4 without one."""
_SASS = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)$")
_SASS_LABEL = re.compile(r"^(\.L\w+):")
_SASS_MMA = re.compile(r"(?:[HIQOBD]|HG|QG|IG|BG|UTC[HQIO])MMA")
_GCN = re.compile(r"^\s+([a-z]\w+)\b(.*)$")
_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN_LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:dword(x[234])?|([us]?byte|[us]?short)\w*|b(\d+))")


@dataclass(frozen=True)
class InstructionMix:
    """Of one entry."""

    mma: dict[str, int]
    """Matrix instructions by name, with how often they stand in the code."""
    copies: dict[str, int]
    """Loads from global memory by name."""
    loop_load_bytes: int | None
    """Least bytes that a thread loads at a time in the main loop; 0 where only the tensor memory accelerator does, None
    where nothing is loaded in one."""

    @property
    def wide(self) -> bool:
        """Whether the main loop loads 16 bytes a thread, or by the tensor memory accelerator."""
        return self.loop_load_bytes is None or self.loop_load_bytes in (0, 16)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class _Line:
    label: str
    opcode: str
    operands: str


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin.

    Raises:
        TilewrightError: when it cannot be disassembled.

    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [str(bundled_tool("nvdisasm")), "-c", str(path)], capture_output=True, text=True, check=False
        )
    if done.returncode != 0 or not done.stdout:
        raise TilewrightError(f"nvdisasm cannot read the cubin: {done.stderr.strip()[:200]}")
    return done.stdout


def read_sass(text: str) -> InstructionMix:
    """Instruction mix of NVIDIA machine code, as nvdisasm writes it."""
    lines = _lines(text, _SASS_LABEL, _SASS)
    mma = Counter(line.opcode for line in lines if _SASS_MMA.fullmatch(line.opcode.partition(".")[0]))
    loads = {"LDG", "LDGSTS", "UTMALDG", "UBLKCP"}
    copies = Counter(line.opcode for line in lines if line.opcode.partition(".")[0] in loads)
    loop = _main_loop(lines, mma, "BRA")
    widths = []
    for line in loop:
        name, *suffixes = line.opcode.split(".")
        if name in ("UTMALDG", "UBLKCP"):
            widths.append(0)
        elif name in ("LDG", "LDGSTS"):
            widths.append(next((_WIDTHS[s] for s in suffixes if s in _WIDTHS), 4))
    return InstructionMix(dict(mma), dict(copies), _least(widths))


def read_amdgcn(text: str) -> InstructionMix:
    """Instruction mix of AMD assembly."""
    lines = _lines(text, _GCN_LABEL, _GCN)
    mma = Counter(line.opcode for line in lines if line.opcode.startswith(("v_mfma", "v_smfmac", "v_wmma")))
    copies = Counter(line.opcode for line in lines if _GCN_LOAD.match(line.opcode))
    widths = []
    for line in _main_loop(lines, mma, "s_cbranch"):
        if found := _GCN_LOAD.match(line.opcode):
            dwords, small, bits = found.groups()
            if small:
                widths.append(1 if "byte" in small else 2)
            else:
                widths.append(int(bits) // 8 if bits else 4 * int(dwords[1:] if dwords else 1))
    return InstructionMix(dict(mma), dict(copies), _least(widths))


def _least(widths: Sequence[int]) -> int | None:
    """The narrowest load by threads; 0 where there is none but the accelerator's."""
    by_threads = [width for width in widths if width]
    return min(by_threads) if by_threads else (0 if widths else None)


def _lines(text: str, label: re.Pattern[str], instruction: re.Pattern[str]) -> list[_Line]:
    lines = []
    for line in text.splitlines():
        if found := label.match(line):
            lines.append(_Line(found[1], "", ""))
        elif found := instruction.match(line):
            lines.append(_Line("", found[1], found[2]))
    return lines


def _main_loop(lines: Sequence[_Line], mma: Counter[str], branch: str) -> Sequence[_Line]:
    """The shortest stretch that a backward branch repeats and that multiplies matrices; else any; else none."""
    labels = {line.label: index for index, line in enumerate(lines) if line.label}
    loops = []
    for index, line in enumerate(lines):
        if line.opcode.startswith(branch):
            begin = next((labels[name] for name in re.findall(r"\.L\w+", line.operands) if name in labels), index)
            if begin < index - 1:
                loops.append(lines[begin:index])
    multiplying = [loop for loop in loops if any(line.opcode in mma for line in loop)]
    return min(multiplying or loops, key=len, default=())
