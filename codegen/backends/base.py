"""A backend: one language that kernels are written in. A new one is a folder beside this file and a registration.

Nothing outside of a backend's folder, the registry and :class:`tilewright.tuner.targets.base.Target` asks which
language or which kind of arch it has to do with; it asks the backend of a template's language, or the target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from tilewright.codegen.backends.binaries.facts import EntryFacts
from tilewright.codegen.backends.binaries.instructions import InstructionMix
from tilewright.codegen.recipe.model import Launch
from tilewright.errors import TilewrightError

ArtifactKind = Literal["host_so", "cubin", "hsaco"]


class Entry(Protocol):
    """What has to be known of one entry point of a GPU source; every language has its own, as plain data."""

    @property
    def entry(self) -> str:
        """Name of the function."""

    @property
    def num_warps(self) -> int:
        """Warps of a block, as asked for."""

    @property
    def num_stages(self) -> int:
        """Tiles in flight, from which predictions estimate shared memory before anything is built."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, a part of what a build is found by."""


@dataclass(frozen=True)
class Source:
    """A rendered source, with what has to be known of its entry points; C++ sources say it themselves."""

    text: str
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class BuiltFile:
    """One artifact of a build, still a file."""

    path: Path
    kind: ArtifactKind
    facts: EntryFacts | None = None
    """Read back from a GPU binary, which has one entry."""


@dataclass(frozen=True)
class Build:
    """One finished build: where it lies, or why there is none."""

    path: Path | None
    """The shared object, or the folder with all that came of a GPU source."""
    message: str
    cpu_s: float
    """User and system time of the compiler; 0 when the build was there already."""
    files: tuple[BuiltFile, ...] = ()
    """For ``host_so`` the one file; of a GPU source one for each launch, in order."""
    rejected: bool = False
    """Whether it compiled, but could never be launched: ``message`` says why, and ``path`` is None."""


class Builder(Protocol):
    """Builds sources for one arch; content-addressed, so that equal sources are built once. Close it when done."""

    @property
    def toolchain(self) -> str:
        """What builds, in one line: a part of every kernel's identity."""

    def build_all(
        self, sources: Sequence[Source], *, jobs: int | None = None, progress: Callable[[int], None] | None = None
    ) -> list[Build]:
        """Build side by side; the result keeps the order of ``sources``. ``progress`` gets the number done.

        A source that does not build is a :class:`Build` with a message. An exception, Ctrl-C among them, ends the
        compilers that run, and leaves nothing half built.
        """

    def form(self, source: Source, index: int, form: str) -> str:
        """One of :meth:`Backend.forms` of an entry; built again if it is not there.

        Raises:
            TilewrightError: when the source does not build, or has no such form.

        """

    def close(self) -> None:
        """End what it started."""


class Backend(ABC):
    """One language: how its templates are named, built and launched, and what their binaries say of themselves."""

    language: ClassVar[str]
    """As templates name it."""
    template_suffix: ClassVar[str]
    """Ends the names of its template files, ``.cpp.jinja``."""
    comment: ClassVar[str]
    """Begins a line of comment."""

    @abstractmethod
    def builder(self, arch: Any, directory: Path | None = None) -> Builder:
        """A builder for ``arch``, one of the archs that the language's templates are for.

        Args:
            arch: to build for.
            directory: where builds are kept; None: in the user's cache.

        Raises:
            TilewrightError: when the compiler is missing or too old, or ``directory`` cannot be made.

        """

    def formatted(self, source: str) -> str:
        """A rendered source as the language's formatter would leave it."""
        return source

    @abstractmethod
    def built_launches(
        self, launches: Sequence[Launch], files: Sequence[BuiltFile], checksums: Sequence[str], arch: Any
    ) -> tuple[Launch, ...]:
        """A recipe's launches with what only a build tells: checksums; of GPU binaries block, cluster, shared memory.

        Args:
            launches: as the template gives them.
            files: the artifacts of the build.
            checksums: of ``files``, in order.
            arch: that they were built for.

        Raises:
            TilewrightError: when a binary does not take what its launch passes.

        """

    def instructions(self, file: BuiltFile, source: str) -> InstructionMix:
        """Instructions of an artifact made from ``source``.

        Raises:
            TilewrightError: when it cannot be disassembled, or the language's artifacts are not looked into.

        """
        del source
        raise TilewrightError(f"instructions of {file.kind} artifacts are not counted")

    def forms(self, arch: Any) -> tuple[str, ...]:
        """Names of the intermediate forms that compiling for ``arch`` goes through; empty where none are kept.

        The last one is nearest to the binary.
        """
        del arch
        return ()

    @abstractmethod
    def disassembly(self, kind: ArtifactKind, binary: bytes) -> str | None:
        """Machine code of an artifact as text without addresses, so that only differing instructions differ.

        None where there is no disassembler: the last of :meth:`forms` has to do.

        Raises:
            TilewrightError: when the disassembler is missing or refuses.

        """
