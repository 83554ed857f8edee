"""Triton sources to GPU binaries, without a GPU: compiled in a warm pool, read back, checked, kept by content."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from tilewright.codegen.backends.base import Build, BuiltFile, Source
from tilewright.codegen.backends.binaries.cubin import read_cubin, read_spills
from tilewright.codegen.backends.binaries.facts import EntryFacts, TensorMapFacts, launch_obstacle
from tilewright.codegen.backends.binaries.hsaco import read_hsaco
from tilewright.codegen.backends.building import DRAFT, refuse_full_disk, side_by_side
from tilewright.codegen.backends.kept import BUILDS, KeptBuilds
from tilewright.codegen.backends.triton.compile import BINARIES, FORMS
from tilewright.codegen.backends.triton.entry import EntrySpec, triton_entries
from tilewright.codegen.backends.triton.launch import parameter_mismatch
from tilewright.codegen.backends.triton.pool import CompilePool, CompileServerError, Finished, Limits
from tilewright.codegen.backends.triton.toolchain import toolchain
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.errors import TilewrightError
from tilewright.temporary import remove_abandoned, temporary_folder

_FORMAT = 2
"""Of a build's folder; a part of its name."""
SOURCE_NAME = "kernel.py"
"""Of the file that is compiled; binaries name its lines."""
_LONGEST_MESSAGE = 500
_REGISTER_BYTES = 4
_WARP_THREADS = 32
"""Of NVIDIA's GPUs."""
_KEPT = ("json", "log", *BINARIES, *FORMS)


class TritonBuilder:
    """Builds Triton sources for one GPU arch. Safe to share between threads and between processes.

    Use as a context manager, or close it: it has a server process from the first build on.

    Raises:
        TilewrightError: when Triton or its assembler is missing or too old, or ``directory`` cannot be made.

    """

    def __init__(self, arch: GpuArch, directory: Path | None = None, limits: Limits | None = None) -> None:
        self.arch = arch
        self._kept = KeptBuilds(directory, f"{BUILDS}-triton")
        self.directory = self._kept.folder
        self._toolchain = toolchain(arch)
        remove_abandoned(self.directory, DRAFT)
        self._pool = CompilePool(limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server process."""
        self._pool.close()

    @property
    def toolchain(self) -> str:
        """What builds: Triton, assembler and target."""
        return self._toolchain

    def path_for(self, source: Source) -> Path:
        """Folder of what came of ``source``: a function of its text, entries and toolchain."""
        entries = [entry.to_dict() for entry in source.entries]
        identity = json.dumps([_FORMAT, self.toolchain, source.text, entries], sort_keys=True)
        return self.directory / hashlib.sha256(identity.encode()).hexdigest()[:40]

    def build_all(
        self, sources: Sequence[Source], *, jobs: int | None = None, progress: Callable[[int], None] | None = None
    ) -> list[Build]:
        """Build many sources side by side; the result keeps their order. ``progress`` gets the number done.

        An exception, Ctrl-C among them, ends the compilers that run.
        """
        return side_by_side(self._build, sources, jobs, progress)

    def build(self, source: Source) -> Build:
        """Build one source, or find it built. A compiler that fails, crashes or hangs gives a message."""
        return self._build(source, threading.Event())

    def form(self, source: Source, index: int, form: str) -> str:
        """An intermediate form (``ttgir``, ``ptx``, ``amdgcn``) of an entry; built again if it is not there.

        Raises:
            TilewrightError: when the source does not build, or has no such form.

        """
        build = self.build(source)
        if build.path is None:
            raise TilewrightError(f"it does not build with {self.toolchain}: {build.message}")
        path = build.path / f"{index}.{form}"
        if not path.exists():
            raise TilewrightError(f"{self.arch.name} has no {form}")
        return path.read_text()

    def _build(self, source: Source, stop: threading.Event) -> Build:
        path = self.path_for(source)
        if self._kept.holds(path.name):
            return self._read(path, triton_entries(source.entries), 0.0)
        with temporary_folder(DRAFT, self.directory) as name:
            folder = Path(name)
            code = folder / SOURCE_NAME
            code.write_text(source.text)
            try:
                finished = self._pool.compile(code, source, self.arch, folder, stop)
            except CompileServerError as error:
                return Build(None, f"{self.toolchain}: {error}", 0.0)
            if message := self._failure(finished, folder):
                return Build(None, message, finished.cpu_s)
            self._settle(folder, path)
        return self._read(path, triton_entries(source.entries), finished.cpu_s)

    def _settle(self, folder: Path, path: Path) -> None:
        """Give what is needed later its name, at once and for good."""
        made = folder / "made"
        made.mkdir()
        for file in folder.iterdir():
            if file.suffix[1:] in _KEPT:
                file.rename(made / file.name)
        self._kept.keep(made, path.name)

    def _failure(self, finished: Finished, folder: Path) -> str | None:
        """Why there is no binary; None when there is one."""
        if finished.status == 0:
            return None
        if finished.stopped:
            return f"{self.toolchain} was stopped {finished.stopped}"
        errors = folder / "errors"
        text = errors.read_text(errors="replace") if errors.exists() else ""
        refuse_full_disk(self.toolchain, text, self.directory)
        text = text.replace(str(folder / SOURCE_NAME), SOURCE_NAME)
        if "MemoryError" in text or "bad_alloc" in text:
            return f"{self.toolchain} took more than {self._pool.limits.memory_bytes >> 30} GiB of memory"
        if finished.status < 0 and finished.cpu_s > 0.8 * self._pool.limits.cpu_s:
            return f"{self.toolchain} was stopped after {self._pool.limits.cpu_s} s of CPU time"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = lines[-1] if lines else "it said nothing"
        how = f"signal {-finished.status}" if finished.status < 0 else f"status {finished.status}"
        return f"{self.toolchain} failed ({how}): {said[:_LONGEST_MESSAGE]}"

    def _read(self, path: Path, entries: Sequence[EntrySpec], cpu_s: float) -> Build:
        """What lies in ``path``, if it could be launched."""
        files = []
        for index, entry in enumerate(entries):
            kind = "cubin" if self.arch.family == "cuda" else "hsaco"
            binary = path / f"{index}.{kind}"
            try:
                facts = _facts(path, index, entry, binary.read_bytes(), kind)
            except ValueError as error:
                return Build(None, f"what {self.toolchain} made cannot be read: {error}", cpu_s)
            obstacle = launch_obstacle(facts, self.arch) or parameter_mismatch(entry, facts.parameter_bytes)
            if obstacle:
                return Build(None, obstacle, cpu_s, rejected=True)
            files.append(BuiltFile(binary, "cubin" if kind == "cubin" else "hsaco", facts))
        return Build(path, "", cpu_s, tuple(files))


def _facts(path: Path, index: int, entry: EntrySpec, binary: bytes, kind: str) -> EntryFacts:
    told: dict[str, Any] = json.loads((path / f"{index}.json").read_text())
    if told["scratch_bytes"]:
        raise ValueError(
            f"{entry.entry} wants {told['scratch_bytes']} bytes of scratch memory, which launches do not give"
        )
    if kind == "cubin":
        cubin = read_cubin(binary, entry.entry)
        stores, loads = read_spills((path / f"{index}.log").read_text())
        registers, static, stack = cubin.registers, cubin.static_smem_bytes, cubin.stack_bytes
        parameters = cubin.parameter_bytes
        cubin.require_launch(entry.entry, threads=_WARP_THREADS * told["num_warps"], cluster=told["num_ctas"])
    else:
        hsaco = read_hsaco(binary, entry.entry)
        stores = loads = _REGISTER_BYTES * hsaco.spilled_registers
        registers, static, stack = hsaco.registers, hsaco.static_smem_bytes, hsaco.stack_bytes
        parameters = hsaco.parameter_bytes
    return EntryFacts(
        entry=entry.entry,
        registers=registers,
        spill_store_bytes=stores,
        spill_load_bytes=loads,
        stack_bytes=stack,
        static_smem_bytes=static,
        smem_bytes=static + told["shared"],
        tensor_memory_columns=told["tensor_memory_columns"],
        num_warps=told["num_warps"],
        cluster=told["num_ctas"],
        parameter_bytes=parameters,
        tensor_maps=tuple(TensorMapFacts(**{**each, "box": tuple(each["box"])}) for each in told["tensor_maps"]),
    )
