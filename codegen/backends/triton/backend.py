"""The backend of Triton: one GPU binary per launch, with two hidden parameters behind those of the source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from tilewright.codegen.backends.base import ArtifactKind, Backend, BuiltFile
from tilewright.codegen.backends.binaries.instructions import (
    InstructionMix,
    disassemble,
    read_amdgcn,
    read_sass,
    streamed_lines,
)
from tilewright.codegen.backends.triton.builder import SOURCE_NAME, TritonBuilder
from tilewright.codegen.backends.triton.launch import built_launch
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.recipe.model import Launch


class TritonBackend(Backend):
    """Triton for NVIDIA and AMD GPUs."""

    language: ClassVar[str] = "triton"
    template_suffix: ClassVar[str] = ".py.jinja"
    comment: ClassVar[str] = "#"

    def builder(self, arch: GpuArch, directory: Path | None = None) -> TritonBuilder:
        """Triton with the assembler that it brings."""
        return TritonBuilder(arch, directory)

    def formatted(self, source: str) -> str:
        """Two empty lines before every function, and one line break at the end."""
        return re.sub(r"\n+(@triton\.jit\n)", r"\n\n\n\1", source).rstrip("\n") + "\n"

    def built_launches(
        self, launches: Sequence[Launch], files: Sequence[BuiltFile], checksums: Sequence[str], arch: GpuArch
    ) -> tuple[Launch, ...]:
        """Every launch has a binary of its own, whose parameters are compared with what the launch passes."""
        made = []
        for launch, file, checksum in zip(launches, files, checksums, strict=True):
            assert file.facts is not None
            made.append(built_launch(launch, file.facts, checksum, arch.warp_size))
        return tuple(made)

    def instructions(self, file: BuiltFile, source: str) -> InstructionMix:
        """Of a cubin by nvdisasm; of an hsaco from the assembly that lies beside it."""
        streamed = streamed_lines(source)
        if file.kind == "cubin":
            return read_sass(disassemble(file.path.read_bytes(), lines=True), streamed, SOURCE_NAME)
        return read_amdgcn(file.path.with_suffix(".amdgcn").read_text(), streamed, SOURCE_NAME)

    def forms(self, arch: GpuArch) -> tuple[str, ...]:
        """Triton's own form for GPUs, then the text that is assembled."""
        return ("ttgir", "ptx") if arch.family == "cuda" else ("ttgir", "amdgcn")

    def disassembly(self, kind: ArtifactKind, binary: bytes) -> str | None:
        """SASS of a cubin; nothing takes an hsaco apart."""
        return re.sub(r"/\*[0-9a-f]{4,}\*/", "", disassemble(binary)) if kind == "cubin" else None
