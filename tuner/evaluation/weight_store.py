"""Weights where kernels read them, several copies of each layout; the least recently used layouts make room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.recipe.model import TensorSpec, packable

Copies = Callable[[int], int]

_ROUNDED_SHARE = 0.25
"""Of the capacity, that rounded copies for references may take beside it."""

L = TypeVar("L")
"""A layout; None: as the op declares the weight."""
M = TypeVar("M")
"""Memory of one tensor."""
N = TypeVar("N")


class LayoutStore(ABC, Generic[L, M]):
    """The weights of one signature.

    Args:
        tensors: of the op's calls.
        arrays: what the op made for the role ``weight``, as the references read it.
        copies: of the packable weight, by its bytes in a layout, so that a rotation of them exceeds the cache.
        capacity_bytes: for all layouts together; what a single request needs is always granted.

    """

    def __init__(self, tensors: Sequence[TensorSpec], arrays: Arrays, *, copies: Copies, capacity_bytes: int) -> None:
        self._packable = packable(tensors)
        self._copies = copies
        self._capacity_bytes = capacity_bytes
        self.arrays = arrays
        self._layouts: dict[L | None, list[M]] = {}
        self._rounded: dict[str, NDArray[np.float32]] = {}

    @abstractmethod
    def _declared(self) -> Mapping[str, M]:
        """Memory of every weight tensor as the op declares it, by name."""

    @abstractmethod
    def _declared_bytes(self, weight: NDArray[Any]) -> int:
        """Bytes of the packable weight as the op declares it, in that memory."""

    @abstractmethod
    def _packed_bytes(self, weight: NDArray[Any], layout: L) -> int:
        """Bytes of the packable weight in ``layout``."""

    @abstractmethod
    def _further(self, weight: NDArray[Any], count: int) -> list[M]:
        """``count`` copies more of the packable weight as the op declares it."""

    @abstractmethod
    def _pack(self, weight: NDArray[Any], layout: L, count: int) -> list[M]:
        """``count`` copies of the packable weight in ``layout``."""

    @abstractmethod
    def _round(self, weight: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
        """The packable weight as kernels read it from ``precision``."""

    @abstractmethod
    def _free(self, memory: Iterable[M]) -> None:
        """Give memory back."""

    def groups(self, layouts: Sequence[L | None]) -> list[list[int]]:
        """Split indices into ``layouts`` into groups whose distinct layouts fit the capacity together, in order."""
        return capacity_groups([{layout: self._layout_bytes(layout)} for layout in layouts], self._capacity_bytes)

    def require(self, layouts: Iterable[L | None]) -> None:
        """Make ``layouts``, and drop others when there is no room for them."""
        wanted = dict.fromkeys(layouts)
        held = {layout: self._layouts.pop(layout) for layout in wanted if layout in self._layouts}
        needed = sum(map(self._layout_bytes, wanted))
        while self._layouts and needed + sum(map(self._layout_bytes, self._layouts)) > self._capacity_bytes:
            oldest = next(iter(self._layouts))
            self._drop(self._layouts.pop(oldest))
        for layout in wanted:
            self._layouts[layout] = held.get(layout) or self._make(layout)

    def tensors(self, layout: L | None, copy: int) -> Mapping[str, M]:
        """Weight tensors with the packable one in ``layout``, which must have been required."""
        declared = self._declared()
        if self._packable is None:
            return declared
        copies = self._layouts[layout]
        return {**declared, self._packable.name: copies[copy % len(copies)]}

    def rounded(self, precision: str) -> Arrays:
        """The weights as the op declares them, with the values that they have once they are stored in ``precision``.

        A copy, of which the latest few are kept.
        """
        if precision == LOSSLESS or self._packable is None:
            return self.arrays
        name = self._packable.name
        weight = self.arrays[name]
        rounded = self._rounded.pop(precision, None)
        if rounded is None:
            rounded = self._round(weight, precision)
        while self._rounded and (len(self._rounded) + 1) * weight.nbytes > _ROUNDED_SHARE * self._capacity_bytes:
            self._rounded.pop(next(iter(self._rounded)))
        self._rounded[precision] = rounded
        return {**self.arrays, name: rounded}

    def close(self) -> None:
        """Free everything."""
        for memory in self._layouts.values():
            self._drop(memory)
        self._layouts.clear()
        self._rounded.clear()
        self.arrays.clear()
        self._free(self._declared().values())

    def _layout_bytes(self, layout: L | None) -> int:
        if self._packable is None:
            return 0
        weight = self.arrays[self._packable.name]
        if layout is None:
            nbytes = self._declared_bytes(weight)
            return (self._copies(nbytes) - 1) * nbytes
        nbytes = self._packed_bytes(weight, layout)
        return self._copies(nbytes) * nbytes

    def _make(self, layout: L | None) -> list[M]:
        if self._packable is None:
            return []
        name = self._packable.name
        weight = self.arrays[name]
        if layout is None:
            return [self._declared()[name], *self._further(weight, self._copies(self._declared_bytes(weight)) - 1)]
        return self._pack(weight, layout, self._copies(self._packed_bytes(weight, layout)))

    def _drop(self, memory: Iterable[M]) -> None:
        declared = set(map(id, self._declared().values()))
        self._free(each for each in memory if id(each) not in declared)


def capacity_groups(needs: Sequence[Mapping[N, int]], capacity_bytes: int) -> list[list[int]]:
    """Split indices into ``needs`` into groups whose parts fit ``capacity_bytes`` together, in order.

    Each need says its parts by name, with their bytes; equal names are the same memory.
    """
    groups: list[list[int]] = []
    held: dict[N, int] = {}
    for index, need in enumerate(needs):
        wanted = {**held, **need}
        if groups and sum(wanted.values()) <= capacity_bytes:
            groups[-1].append(index)
            held = wanted
        else:
            groups.append([index])
            held = dict(need)
    return groups
