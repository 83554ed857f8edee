"""Numbers that stand for what is prepared in this process: a torch graph can hold a number, but not a Python object."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, TypeVar

from tilewright.errors import TilewrightError

T = TypeVar("T")

_numbers = itertools.count(1)
_held: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def hold(prepared: object) -> int:
    """A number for ``prepared``, which does not keep it alive; never given twice in a process."""
    handle = next(_numbers)
    _held[handle] = prepared
    return handle


def held(handle: int, kind: type[T]) -> T:
    """What ``handle`` stands for.

    Raises:
        TilewrightError: when it no longer exists, is of another kind, or was prepared in another process.

    """
    prepared = _held.get(handle)
    if not isinstance(prepared, kind):
        raise TilewrightError(
            f"no {kind.__name__} of this process has the handle {handle}; a graph that calls tilewright is valid "
            "where it was traced, for as long as what it calls exists"
        )
    return prepared
