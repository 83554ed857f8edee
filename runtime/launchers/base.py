"""A launcher: how artifacts of one kind become code that this process calls. A new one is a module and a line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.recipe.model import Recipe
from tilewright.errors import TilewrightError


class KernelRefused(TilewrightError):  # noqa: N818 - named for what the user reads
    """A stored kernel cannot be served by this process; plain torch serves in its place."""


class LoadedArtifact(Protocol):
    """An artifact in this process, which is never unloaded: a kernel may be running in any thread."""

    def entry_address(self, name: str) -> int:
        """Address of the entry ``name``.

        Raises:
            KernelRefused: when there is no such entry.

        """


class Launcher(ABC):
    """Loads artifacts of one kind and says which kernels it can call."""

    kind: ClassVar[str]
    """Of artifacts, as the database names it."""

    @abstractmethod
    def require(self, recipe: Recipe) -> None:
        """Refuse a kernel whose recipe asks for what this launcher does not have.

        Raises:
            KernelRefused: names what it asks for.

        """

    @abstractmethod
    def weight_layout(self, recipe: Recipe) -> WeightLayout | RowLayout | None:
        """The layout in which a kernel takes its weight; None: as the op declares it.

        Raises:
            KernelRefused: when the runtime packs no weight so.

        """

    @abstractmethod
    def load(self, checksum: str, read_bytes: Callable[[], bytes]) -> LoadedArtifact:
        """The artifact whose sha256 is ``checksum``, in this process; once loaded, the same one every time.

        Args:
            checksum: of the artifact.
            read_bytes: gives its bytes; not called when they are at hand.

        Raises:
            KernelRefused: when it cannot be loaded, or is called in another way than this release calls.
            TilewrightError: whatever ``read_bytes`` raises.

        """
