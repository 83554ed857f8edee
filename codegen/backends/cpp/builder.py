"""C++ sources to shared objects: finds a compiler, builds in bounded processes, keeps what it built by content."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewright import disks
from tilewright.codegen.backends.base import Build, BuiltFile, Source
from tilewright.codegen.backends.building import DRAFT, refuse_full_disk, side_by_side
from tilewright.codegen.backends.kept import BUILDS, KeptBuilds
from tilewright.codegen.hardware.archs import CpuArch
from tilewright.errors import TilewrightError
from tilewright.temporary import remove_abandoned, temporary_folder

FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
    "-nodefaultlibs",
    "-lc",
    "-w",
)
"""No OpenMP: kernels get their threads from the host. No C++ library: kernels use the language only."""

CPU_LIMIT_S = 60
MEMORY_LIMIT_KIB = 4 << 20
_LONGEST_OUTPUT = 1 << 16


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that was found to run."""

    command: str
    """As a user writes ``$CXX`` for make: a program, or one with what runs it and flags (``ccache g++ -m64``)."""
    version: str
    """First line of ``--version``; part of every kernel's identity."""

    @property
    def words(self) -> tuple[str, ...]:
        """``command`` as a shell splits it; the name of a program may have blanks in it."""
        return _words(self.command)

    @property
    def own_flags(self) -> tuple[str, ...]:
        """What ``command`` asks for beside the program and what runs it."""
        return tuple(itertools.dropwhile(lambda word: not word.startswith("-"), self.words))

    def flags(self, arch: CpuArch) -> tuple[str, ...]:
        """Flags that build a kernel for ``arch``."""
        return (*FLAGS, *arch.compile_flags)

    def toolchain(self, arch: CpuArch) -> str:
        """Compiler and flags in one line; how the compiler is run (``ccache``) makes no other kernel."""
        text = " ".join((self.version, *self.own_flags, *self.flags(arch)))
        return os.fsencode(text).decode(errors="backslashreplace")  # a flag may name a folder that is no UTF-8


def find_compiler(environment: dict[str, str] | None = None) -> Compiler:
    """``$CXX`` if set and not empty, read as make reads it; else clang++ (also under a version suffix), else g++.

    Raises:
        TilewrightError: when there is none, or ``$CXX`` does not run.

    """
    environment = dict(os.environ) if environment is None else environment
    chosen = environment.get("CXX", "").strip()
    if chosen:
        return _chosen_compiler(chosen)
    for name in ("clang++", *_versioned_clangs(environment.get("PATH", "")), "g++"):
        found = shutil.which(name, path=environment.get("PATH"))
        version = _version((found,)) if found else None
        if found and version:
            return Compiler(found, version)
    raise TilewrightError(
        "no C++ compiler was found; install clang (Debian: apt install clang) or g++ (apt install g++), or set $CXX"
    )


def _chosen_compiler(command: str) -> Compiler:
    advice = "set it to a C++ compiler, with its flags if need be, or unset it"
    try:
        words = _words(command)
    except ValueError as error:
        raise TilewrightError(f"$CXX is {command!r}, which no shell could read ({error}); {advice}") from error
    version = _version(words)
    if version is None:
        missing = None if shutil.which(words[0]) else f"there is no program {words[0]}"
        raise TilewrightError(f"$CXX is {command!r}, which does not run{f': {missing}' if missing else ''}; {advice}")
    return Compiler(command, version)


def _words(command: str) -> tuple[str, ...]:
    """Words of a command.

    Raises:
        ValueError: when a quotation does not end.

    """
    if shutil.which(command):
        return (command,)
    words = shlex.split(command)
    # A shell takes these for variables of the program's environment.
    return ("env", *words) if re.match(r"[A-Za-z_]\w*=", words[0]) else tuple(words)


def _versioned_clangs(path: str) -> list[str]:
    names = {file.name for folder in path.split(os.pathsep) if folder for file in Path(folder).glob("clang++-*")}
    numbered = [name for name in names if re.fullmatch(r"clang\+\+-\d+", name)]
    return sorted(numbered, key=lambda name: -int(name.rpartition("-")[2]))


def _version(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    first = done.stdout.partition("\n")[0].strip()
    return first if done.returncode == 0 and first else None


class CppBuilder:
    """Builds C++ sources for one arch. Safe to share between threads and between processes.

    Raises:
        TilewrightError: when there is no compiler, or ``directory`` cannot be made.

    """

    def __init__(self, arch: CpuArch, compiler: Compiler | None = None, directory: Path | None = None) -> None:
        self.arch = arch
        self.compiler = compiler or find_compiler()
        self._kept = KeptBuilds(directory, BUILDS)
        self.directory = self._kept.folder
        remove_abandoned(self.directory, DRAFT)

    @property
    def toolchain(self) -> str:
        """What builds: compiler and flags."""
        return self.compiler.toolchain(self.arch)

    def path_for(self, source: str) -> Path:
        """Where the object of ``source`` lies once it is built: a function of source, flags and compiler."""
        digest = hashlib.sha256(f"{self.toolchain}\0{source}".encode()).hexdigest()
        return self.directory / f"{digest[:40]}.so"

    def build_all(
        self, sources: Sequence[Source], *, jobs: int | None = None, progress: Callable[[int], None] | None = None
    ) -> list[Build]:
        """Build many sources side by side; the result keeps their order. ``progress`` gets the number done.

        An exception, Ctrl-C among them, ends the compilers that run.
        """
        return side_by_side(self._build, sources, jobs, progress)

    def build(self, source: str) -> Build:
        """Build one source, or find it built. A compiler that fails or hangs gives a message, no object."""
        with disks.writing(self.directory):
            return self._build(Source(source), threading.Event())

    def form(self, source: Source, index: int, form: str) -> str:
        """No form is kept between source and object.

        Raises:
            TilewrightError: always.

        """
        del source, index
        raise TilewrightError(f"C++ kernels have no intermediate form {form}; compare their source and machine code")

    def close(self) -> None:
        """Nothing runs between builds."""

    def _build(self, source: Source, stop: threading.Event) -> Build:
        path = self.path_for(source.text)
        if self._kept.holds(path.name):
            return Build(path, "", 0.0, (BuiltFile(path, "host_so"),))
        with temporary_folder(DRAFT, self.directory) as folder:
            code, made = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            code.write_text(source.text)
            message, cpu_s = self._compile(code, made, stop)
            if message:
                return Build(None, message, cpu_s)
            self._kept.keep(made, path.name)
        return Build(path, "", cpu_s, (BuiltFile(path, "host_so"),))

    def _compile(self, code: Path, made: Path, stop: threading.Event) -> tuple[str, float]:
        """Message (empty: it worked) and CPU seconds."""
        limits = f'ulimit -t {CPU_LIMIT_S}; ulimit -v {MEMORY_LIMIT_KIB}; exec "$@"'
        command = [*self.compiler.words, *self.compiler.flags(self.arch), str(code), "-o", str(made)]
        # In memory: a full disk would keep it from saying so.
        with os.fdopen(os.memfd_create("tilewright-compiler", os.MFD_CLOEXEC), "w+b") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", limits, "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},  # a full disk is told from a fault by what it prints
            )
            try:
                status, cpu_s = _wait(process, 2 * CPU_LIMIT_S, stop)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            output.seek(0)
            printed = output.read(_LONGEST_OUTPUT).decode(errors="replace")
        if status is None:
            reason = "on request" if stop.is_set() else f"after {2 * CPU_LIMIT_S} s"
            return f"{self.compiler.version} was stopped {reason}", cpu_s
        if status < 0 and cpu_s > 0.8 * CPU_LIMIT_S:
            return f"{self.compiler.version} was stopped after {CPU_LIMIT_S} s of CPU time", cpu_s
        if status != 0 or not made.exists():
            text = printed.replace(str(code), "kernel.cpp")[:2000].strip()
            refuse_full_disk(self.compiler.version, f"{_signal(status)} {printed}", self.directory)
            return f"{self.compiler.version} failed (status {status}): {text or 'it said nothing'}", cpu_s
        return "", cpu_s


def _signal(status: int) -> str:
    return signal.strsignal(-status) or "" if status < 0 else ""


def _wait(process: subprocess.Popen[bytes], limit_s: float, stop: threading.Event) -> tuple[int | None, float]:
    """Exit status (None: killed, at the limit or by ``stop``) and CPU seconds of the process and its children."""
    deadline = time.monotonic() + limit_s
    killed = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return (None if killed else process.returncode), usage.ru_utime + usage.ru_stime
        if not killed and (stop.is_set() or time.monotonic() > deadline):
            os.killpg(process.pid, signal.SIGKILL)
            killed = True
        time.sleep(0.005)
