"""The backend of C++: one shared object per kernel, called by the host's threads."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from tilewright import disks
from tilewright.codegen.backends.base import ArtifactKind, Backend, BuiltFile
from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import CpuArch
from tilewright.codegen.recipe.model import Launch
from tilewright.errors import TilewrightError
from tilewright.temporary import temporary_folder

_LIMIT_S = 60
"""For a disassembler, which may be given anything."""


class CppBackend(Backend):
    """C++ with vector intrinsics, for CPUs."""

    language: ClassVar[str] = "cpp"
    template_suffix: ClassVar[str] = ".cpp.jinja"
    comment: ClassVar[str] = "//"

    def builder(self, arch: CpuArch, directory: Path | None = None) -> CppBuilder:
        """Clang or g++, with the flags of ``arch``."""
        return CppBuilder(arch, directory=directory)

    def built_launches(
        self, launches: Sequence[Launch], files: Sequence[BuiltFile], checksums: Sequence[str], arch: CpuArch
    ) -> tuple[Launch, ...]:
        """All launches are entries of the one shared object, which the host calls with what the recipe says."""
        del files, arch
        (checksum,) = checksums
        return tuple(replace(launch, artifact=checksum) for launch in launches)

    def disassembly(self, kind: ArtifactKind, binary: bytes) -> str | None:
        """Of a shared object, by objdump."""
        del kind
        tool = shutil.which("objdump") or shutil.which("llvm-objdump")
        if tool is None:
            raise TilewrightError("no objdump was found; install binutils (Debian: apt install binutils)")
        with disks.writing(disks.TEMPORARY), temporary_folder() as folder:
            path = Path(folder) / "kernel.so"
            path.write_bytes(binary)
            command = [tool, "-d", "--no-show-raw-insn", str(path)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise TilewrightError(f"{tool} cannot read the object: it took more than {error.timeout} s") from error
        if done.returncode != 0:
            raise TilewrightError(f"{tool} cannot read the shared object: {done.stderr.strip()}")
        # The first lines name the temporary file.
        code = done.stdout.partition("Disassembly of section")[2]
        text = re.sub(r"^\s*[0-9a-f]+:\s*", "", code, flags=re.MULTILINE)
        return re.sub(r"\b[0-9a-f]{3,}\b(?= <)|<[^>]*>|# [0-9a-f]+", "", text)
