"""From stored bytes to callable code, such that what is loaded is what was checked.

A shared object is loaded once per process and never unloaded: a kernel may be running in any thread.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tilewright import disks
from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import ABI_VERSION, SM_COUNT, THREADS, Recipe
from tilewright.codegen.recipe.resolve import Place, workspace_bytes
from tilewright.directories import CACHE_VARIABLE, user_cache_directory
from tilewright.runtime.launchers.base import KernelRefused, Launcher
from tilewright.runtime.launchers.elf import exported_functions
from tilewright.runtime.launchers.memory_file import load_from_memory
from tilewright.runtime.locks import fork_safe_lock
from tilewright.trust import UntrustedFile, find_stranger, make_private_folder
from tilewright.tuning_db.integrity import DamagedArtifact, verified


@dataclass(frozen=True, eq=False)
class LoadedSharedObject:
    """A shared object in this process."""

    checksum: str
    library: ctypes.CDLL
    functions: frozenset[str]
    """Those that are its own: the loader would find others in the libraries that it was linked to."""

    def entry_address(self, name: str) -> int:
        """Address of the exported function ``name``.

        Raises:
            KernelRefused: when there is no such function.

        """
        if name not in self.functions:
            raise KernelRefused(f"the artifact {self.checksum[:16]} exports no {name!r}; tune again")
        address = ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value
        assert address is not None  # dlsym found it
        return address


def require_host(recipe: Recipe) -> None:
    """Refuse a kernel that is not called as a ``host_so`` entry is.

    Raises:
        KernelRefused: when the recipe passes what only a GPU's launch knows: a grid, a tensor map, rows of weights.

    """
    host_layout(recipe)
    for launch in recipe.launches:
        if launch.grid or launch.hidden_arguments or launch.shared_memory_bytes != "0":
            raise KernelRefused(f"the kernel's entry {launch.entry} is launched over a grid: {_FOR_GPUS}")
        if any(argument.map for argument in launch.arguments):
            raise KernelRefused(f"the kernel's entry {launch.entry} takes a tensor map: {_FOR_GPUS}")
    if any(SM_COUNT in parsed(text).symbols for text in recipe.expressions):
        raise KernelRefused(f"the kernel asks for {SM_COUNT}, a number of multiprocessors: {_FOR_GPUS}")


def require_convention(recipe: Recipe) -> None:
    """Refuse a stored kernel that would not be passed what kernels of ours take; it would read wild addresses.

    Every tensor comes once, and numbers are sizes. Entries of our own templates (``tilewright_...``) take all tensors
    of the op in order, then all sizes but the number of pages, then the workspace if there is one.

    Raises:
        KernelRefused: names what is passed otherwise.

    """
    names = [tensor.name for tensor in recipe.tensors]
    paged = {
        tensor.bound for tensor in recipe.tensors if tensor.values == "pages"
    }  # checked before, and told no kernel
    tensors, sizes = [("tensor", name) for name in names], sorted(("size", size) for size in {*recipe.sizes} - paged)
    for launch in recipe.launches:
        passed = [(argument.kind, argument.source) for argument in launch.arguments]
        numbers = [source for kind, source in passed if kind == "size"]
        if sorted(source for kind, source in passed if kind == "tensor") != sorted(names):
            raise KernelRefused(f"the kernel's entry {launch.entry} does not get each tensor once; tune again")
        if any(not number.isdecimal() and number not in (*recipe.sizes, THREADS) for number in numbers):
            raise KernelRefused(f"the kernel's entry {launch.entry} gets other numbers than sizes; tune again")
        rest = [each for each in passed[len(names) :] if each[0] != "size"]
        told = passed[len(names) : len(passed) - len(rest)]
        if launch.entry.startswith(_OWN_ENTRIES) and (
            passed != [*tensors, *told, *rest]
            or sorted(told) != sizes
            or rest != ([] if recipe.workspace_bytes == "0" else [("workspace", "")])
        ):
            raise KernelRefused(f"the kernel's entry {launch.entry} gets other arguments than it takes; tune again")
    if any(argument.kind == "workspace" for launch in recipe.launches for argument in launch.arguments):
        least, more = (
            workspace_bytes(recipe, dict.fromkeys(recipe.sizes, size), Place(threads=1)) for size in (1, 4096)
        )
        if not 0 < least <= more:
            raise KernelRefused(f"the kernel asks for {least} and {more} bytes of workspace; tune again")


def host_layout(recipe: Recipe) -> WeightLayout | None:
    """The layout in which a ``host_so`` kernel takes its weight; None: as the op declares it.

    Raises:
        KernelRefused: when it is one of GPU kernels.

    """
    if isinstance(recipe.weight_layout, RowLayout):
        raise KernelRefused(f"the kernel takes its weight in the layout {recipe.weight_layout.key}: {_FOR_GPUS}")
    return recipe.weight_layout


class HostLauncher(Launcher):
    """Shared objects with entries of the C ABI, called on the CPU."""

    kind: ClassVar[str] = "host_so"

    def require(self, recipe: Recipe) -> None:
        """See :func:`require_host` and :func:`require_convention`."""
        require_host(recipe)
        require_convention(recipe)

    def weight_layout(self, recipe: Recipe) -> WeightLayout | None:
        """See :func:`host_layout`."""
        return host_layout(recipe)

    def load(self, checksum: str, read_bytes: Callable[[], bytes]) -> LoadedSharedObject:
        """See :func:`load_artifact`."""
        return load_artifact(checksum, read_bytes)


_OWN_ENTRIES = "tilewright_"
_ABI_VERSION = "tilewright_abi_version"
_FOR_GPUS = "it is for GPUs; tune for this CPU"
_loaded: dict[str, LoadedSharedObject] = {}
_loading = fork_safe_lock()


def artifact_directory() -> Path:
    """Where shared objects lie if they cannot be loaded from memory: ``artifacts`` in the user's cache directory."""
    return user_cache_directory() / "artifacts"


def load_artifact(checksum: str, read_bytes: Callable[[], bytes]) -> LoadedSharedObject:
    """The shared object whose sha256 is ``checksum``, loaded into this process.

    ``read_bytes`` gives its bytes; it is not called when it is loaded already. Thread-safe.

    Raises:
        KernelRefused: when the bytes cannot be loaded, or speak another ABI.
        DamagedArtifact: when the bytes do not have the checksum.
        UntrustedFile: when it has to be loaded from the cache, and others can write there.
        TilewrightError: whatever ``read_bytes`` raises.

    """
    if (known := _loaded.get(checksum)) is not None:
        return known
    # Not under the lock: reading takes the database's, and a fork takes them in another order.
    data = verified(checksum, read_bytes())
    try:
        functions = exported_functions(data)
    except ValueError as error:
        raise KernelRefused(f"the artifact {checksum[:16]} cannot be loaded: {error}; tune again") from error
    if _ABI_VERSION not in functions:
        raise KernelRefused(f"the artifact {checksum[:16]} is no tilewright kernel; tune again")
    with _loading:
        if checksum not in _loaded:
            library = _load(checksum, data)
            _require_abi(library, checksum)
            _loaded[checksum] = LoadedSharedObject(checksum, library, functions)
        return _loaded[checksum]


def _load(checksum: str, data: bytes) -> ctypes.CDLL:
    """From memory; where this system executes nothing from there, from the cache."""
    try:
        return load_from_memory(f"tilewright-{checksum[:16]}.so", data)
    except OSError as error:
        from_memory = error
    path = artifact_directory() / f"{checksum}.so"
    try:
        return _load_from_folder(path, checksum, data)
    except OSError as error:
        raise KernelRefused(
            f"the artifact {checksum[:16]} cannot be loaded from memory ({from_memory}), nor from {path} "
            f"({disks.meaning(error) or error}); "
            f"set ${CACHE_VARIABLE} to a private directory that can be written and executed from"
        ) from error


def _load_from_folder(path: Path, checksum: str, data: bytes) -> ctypes.CDLL:
    """From a file that nobody else can change, or put another one in the place of, after it was hashed."""
    make_private_folder(path.parent)
    path = Path(os.path.realpath(path.parent)) / path.name
    _require_own(path.parent)
    if not path.exists() or _sha256(path) != checksum:
        _write(path, data)
    _require_own(path)
    if _sha256(path) != checksum:
        raise DamagedArtifact(
            f"the artifact {checksum[:16]} was damaged while it was extracted to {path}; free the disk, then retry"
        )
    return ctypes.CDLL(str(path))


def _require_own(path: Path) -> None:
    if found := find_stranger(path):
        raise UntrustedFile(
            f"{found.path} {found.how}, so kernels are not loaded from there; set ${CACHE_VARIABLE} to a directory of "
            "your own"
        )


def _write(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``; other processes see all of it or nothing."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_abi(library: ctypes.CDLL, checksum: str) -> None:
    """Refuse a library that expects to be called in another way; asking is safe in every version."""
    version = library[_ABI_VERSION]
    version.restype = ctypes.c_int32
    version.argtypes = ()
    if (found := version()) != ABI_VERSION:
        raise KernelRefused(
            f"the artifact {checksum[:16]} speaks ABI version {found}, this tilewright {ABI_VERSION}; tune again"
        )
