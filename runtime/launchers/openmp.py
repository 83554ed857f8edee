"""The thread pool that kernels run on: torch's own, through ``GOMP_parallel``. Needs no torch.

libgomp's pool does not survive ``fork``, and a child that enters it waits forever. So kernels run on the calling
thread in every forked child, whoever forked it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_forked = False


class Pool(NamedTuple):
    """Addresses of one OpenMP library's functions; 0 for what is not there."""

    parallel: int
    """``GOMP_parallel``."""
    team_size: int
    """``omp_get_num_threads``."""


_NONE = Pool(0, 0)


def pool() -> Pool:
    """The thread pool of this process; none (run on the calling thread) in a forked child, or without OpenMP."""
    return _NONE if _forked else _find()


def fork_address() -> int:
    """Address of ``GOMP_parallel``; 0 (run on the calling thread) in a forked child, or where there is no OpenMP."""
    return pool().parallel


def forked() -> bool:
    """Whether this process is a forked child, where torch's own threads are gone, too."""
    return _forked


@cache
def _find() -> Pool:
    for library in _libraries():
        if parallel := _address(library, "GOMP_parallel"):
            return Pool(parallel, _address(library, "omp_get_num_threads"))
    return _NONE


def _address(library: ctypes.CDLL, name: str) -> int:
    function = getattr(library, name, None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def _libraries() -> Iterator[ctypes.CDLL]:
    """What this process has loaded already (torch loads its libgomp for all to see), torch's copy, the system's."""
    yield ctypes.CDLL(None)
    for name in (*map(str, _bundled_with_torch()), "libgomp.so.1", "libomp.so.5"):
        try:
            yield ctypes.CDLL(name)
        except OSError:
            continue


def _bundled_with_torch() -> list[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    package = Path(spec.origin).parent
    return sorted(
        path for folder in (package / "lib", package.parent / "torch.libs") for path in folder.glob("libgomp*.so*")
    )


def _mark_forked() -> None:
    global _forked  # noqa: PLW0603 - set in the child only
    _forked = True


os.register_at_fork(after_in_child=_mark_forked)
