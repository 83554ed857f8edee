"""Which instructions a kernel came to: its matrix instructions, and how wide its main loop loads.

Of NVIDIA binaries the disassembly is read (``nvdisasm``, which comes with Triton); of AMD binaries the assembly that
they were made from. Both name the source's lines, so that loads of weights are told from those of scales and indices.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tilewright import disks
from tilewright.codegen.backends.triton.toolchain import bundled_tool
from tilewright.errors import TilewrightError
from tilewright.temporary import temporary_folder

_LIMIT_S = 60
"""For a disassembler, which may be given anything."""
_WIDE_BYTES = 16
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
"""Bytes of a thread's load by suffix of the instruction; 4 without one."""
_SASS = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)$")
_SASS_LABEL = re.compile(r"^(\.L\w+):")
_SASS_MMA = re.compile(r"(?:[HIQOBD]|HG|QG|IG|BG|UTC[HQIO])MMA")
_STREAMED = ("# streamed", "// streamed")
"""End, as comments of their language, the lines of a source that load what its main loop streams: weights, or keys and
values."""
_SASS_LINE = re.compile(r'^\s*//## File "[^"]*?([^/"]+)", line (\d+)')
_GCN_LINE = re.compile(r"^\s+\.loc\s.*;\s+([^:]*):(\d+):")
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
    streamed_load_bytes: int | None = None
    """The same of the loads that the source marks as streamed, wherever they stand; None where it marks none."""

    @property
    def wide(self) -> bool:
        """Whether what is streamed is loaded 16 bytes a thread, or by the tensor memory accelerator."""
        width = self.loop_load_bytes if self.streamed_load_bytes is None else self.streamed_load_bytes
        return width in (None, 0, _WIDE_BYTES)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class _Line:
    label: str
    opcode: str
    operands: str
    source: tuple[str, int] = ("", 0)
    """File and line that it comes from, where the text says so."""


def streamed_lines(source: str) -> frozenset[int]:
    """Numbers of the lines of a kernel's source that load what its main loop streams."""
    return frozenset(at for at, line in enumerate(source.splitlines(), 1) if line.endswith(_STREAMED))


def disassemble(cubin: bytes, *, lines: bool = False) -> str:
    """SASS of a cubin; with the source's ``lines`` among the instructions.

    Raises:
        TilewrightError: when it cannot be disassembled.

    """
    with disks.writing(disks.TEMPORARY), temporary_folder() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(bundled_tool("nvdisasm")), "-c", *(["-g"] if lines else []), str(path)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TilewrightError(f"nvdisasm cannot read the cubin: it took more than {error.timeout} s") from error
    if done.returncode != 0 or not done.stdout:
        raise TilewrightError(f"nvdisasm cannot read the cubin: {done.stderr.strip()[:200]}")
    return done.stdout


def read_sass(text: str, streamed: Collection[int] = (), file: str = "kernel.py") -> InstructionMix:
    """Instruction mix of NVIDIA machine code, as nvdisasm writes it; ``streamed``: lines of ``file``."""
    lines = _lines(text, _SASS_LABEL, _SASS, _SASS_LINE)
    mma = Counter(line.opcode for line in lines if _SASS_MMA.fullmatch(line.opcode.partition(".")[0]))
    copies = Counter(line.opcode for line in lines if _sass_width(line) is not None)
    return _mix(lines, mma, copies, _main_loop(lines, mma, "BRA"), _sass_width, streamed, file)


def read_amdgcn(text: str, streamed: Collection[int] = (), file: str = "kernel.py") -> InstructionMix:
    """Instruction mix of AMD assembly; ``streamed``: lines of ``file``."""
    lines = _lines(text, _GCN_LABEL, _GCN, _GCN_LINE)
    mma = Counter(line.opcode for line in lines if line.opcode.startswith(("v_mfma", "v_smfmac", "v_wmma")))
    copies = Counter(line.opcode for line in lines if _GCN_LOAD.match(line.opcode))
    return _mix(lines, mma, copies, _main_loop(lines, mma, "s_cbranch"), _gcn_width, streamed, file)


def _mix(
    lines: Sequence[_Line],
    mma: Counter[str],
    copies: Counter[str],
    loop: Sequence[_Line],
    width: Callable[[_Line], int | None],
    streamed: Collection[int],
    file: str,
) -> InstructionMix:
    marked = [width(line) for line in lines if line.source[0] == file and line.source[1] in streamed]
    if streamed and not any(each is not None for each in marked):
        # Warps that only load have their copies at the lines of the products that they feed.
        marked = [each for each in map(width, lines) if each == 0]
    return InstructionMix(dict(mma), dict(copies), _least(map(width, loop)), _least(marked))


def _sass_width(line: _Line) -> int | None:
    """Bytes that a thread loads from global memory; 0: the tensor memory accelerator does; None: it is no load."""
    name, *suffixes = line.opcode.split(".")
    if name in ("UTMALDG", "UBLKCP"):
        return 0
    if name in ("LDG", "LDGSTS"):
        return next((_WIDTHS[s] for s in suffixes if s in _WIDTHS), 4)
    return None


def _gcn_width(line: _Line) -> int | None:
    found = _GCN_LOAD.match(line.opcode)
    if found is None:
        return None
    dwords, small, bits = found.groups()
    if small:
        return 1 if "byte" in small else 2
    return int(bits) // 8 if bits else 4 * int(dwords[1:] if dwords else 1)


def _least(widths: Iterable[int | None]) -> int | None:
    """The narrowest load by threads; 0 where there is none but the accelerator's; None without any."""
    loads = [width for width in widths if width is not None]
    return min((width for width in loads if width), default=0) if loads else None


def _lines(
    text: str, label: re.Pattern[str], instruction: re.Pattern[str], source_line: re.Pattern[str]
) -> list[_Line]:
    lines, source = [], ("", 0)
    for line in text.splitlines():
        if found := label.match(line):
            lines.append(_Line(found[1], "", ""))
        elif found := source_line.match(line):
            source = (found[1], int(found[2]))
        elif found := instruction.match(line):
            lines.append(_Line("", found[1], found[2], source))
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
