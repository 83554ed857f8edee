"""A signature's weights: as the op declares them, and packed for the kernels in the race."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.recipe.model import TensorSpec, packable
from tilewright.runtime.weights.packing import pack_array, packed_dtype, packed_shape
from tilewright.tuner.evaluation.cpu.binding import DTYPES
from tilewright.tuner.evaluation.cpu.shared_memory import Block, SharedRegion, share

Release = Callable[[Iterable[SharedRegion]], None]
Copies = Callable[[int], int]

_WORD_BYTES = 4
_ROUNDING_COLUMNS = 16
"""Of panels that are made only to be read back."""
_ROUNDED_SHARE = 0.25
"""Of the capacity, that rounded copies for references may take beside it."""


def pack(weight: NDArray[np.float32], layout: WeightLayout, out: NDArray[Any]) -> None:
    """Pack ``weight`` [experts, n, k] into ``out`` as the runtime does it.

    Raises:
        TilewrightError: when the layout does not suit the weight, or it cannot be quantised.

    """
    pack_array(weight, layout, out, usable_cores())


def round_weight(weight: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
    """``weight`` [experts, n, k] as kernels read it from ``precision``: quantised by the runtime, and back.

    Raises:
        TilewrightError: when it cannot be quantised.

    """
    import torch

    from tilewright.runtime.calls.bind import pack_weight
    from tilewright.runtime.weights.experts import PackedWeights

    experts, n, k = weight.shape
    layout = WeightLayout(_ROUNDING_COLUMNS, precision=precision)
    rounded = np.empty_like(weight)
    for expert in range(experts):
        packed = pack_weight(torch.from_numpy(weight[expert : expert + 1]), layout)
        rounded[expert] = PackedWeights(packed, layout, n, k).expert(0).numpy()
    return rounded


class WeightStore:
    """The weights in shared memory, several copies of each layout; the least recently used layouts make room.

    Args:
        tensors: of the op's calls.
        arrays: what the op made for the role ``weight``; copied.
        copies: of the packable weight, by its bytes in a layout, so that a rotation of them exceeds the cache.
        capacity_bytes: for all layouts together; what a single request needs is always granted.
        release: called with regions that are no longer used.

    """

    def __init__(
        self, tensors: Sequence[TensorSpec], arrays: Arrays, *, copies: Copies, capacity_bytes: int, release: Release
    ) -> None:
        self._packable = packable(tensors)
        self._copies = copies
        self._capacity_bytes = capacity_bytes
        self._release = release
        self._blocks = {name: share(array) for name, array in arrays.items()}
        self.arrays: Arrays = {
            name: block.array(arrays[name].dtype, arrays[name].shape) for name, block in self._blocks.items()
        }
        self._layouts: dict[WeightLayout | None, list[Block]] = {}
        self._rounded: dict[str, NDArray[np.float32]] = {}

    def groups(self, layouts: Sequence[WeightLayout | None]) -> list[list[int]]:
        """Split indices into ``layouts`` into groups whose distinct layouts fit the capacity together, in order."""
        groups: list[list[int]] = []
        members: set[WeightLayout | None] = set()
        for index, layout in enumerate(layouts):
            wanted = members | {layout}
            if groups and sum(map(self._layout_bytes, wanted)) <= self._capacity_bytes:
                groups[-1].append(index)
                members = wanted
            else:
                groups.append([index])
                members = {layout}
        return groups

    def require(self, layouts: Iterable[WeightLayout | None]) -> None:
        """Make ``layouts``, and drop others when there is no room for them."""
        wanted = dict.fromkeys(layouts)
        held = {layout: self._layouts.pop(layout) for layout in wanted if layout in self._layouts}
        needed = sum(map(self._layout_bytes, wanted))
        while self._layouts and needed + sum(map(self._layout_bytes, self._layouts)) > self._capacity_bytes:
            oldest = next(iter(self._layouts))
            self._drop(self._layouts.pop(oldest))
        for layout in wanted:
            self._layouts[layout] = held.get(layout) or self._make(layout)

    def tensors(self, layout: WeightLayout | None, copy: int) -> Mapping[str, Block]:
        """Weight tensors with the packable one in ``layout``, which must have been required."""
        if self._packable is None:
            return self._blocks
        copies = self._layouts[layout]
        return {**self._blocks, self._packable.name: copies[copy % len(copies)]}

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
            rounded = round_weight(weight, precision)
        while self._rounded and (len(self._rounded) + 1) * weight.nbytes > _ROUNDED_SHARE * self._capacity_bytes:
            self._rounded.pop(next(iter(self._rounded)))
        self._rounded[precision] = rounded
        return {**self.arrays, name: rounded}

    def close(self) -> None:
        """Free everything."""
        for blocks in self._layouts.values():
            self._drop(blocks)
        self._layouts.clear()
        self._rounded.clear()
        self.arrays.clear()
        self._release(block.region for block in self._blocks.values())

    def _layout_bytes(self, layout: WeightLayout | None) -> int:
        if self._packable is None:
            return 0
        weight = self.arrays[self._packable.name]
        if layout is None:
            return (self._copies(weight.nbytes) - 1) * weight.nbytes
        experts, n, k = weight.shape
        nbytes = layout.packed_words(experts, n, k) * _WORD_BYTES
        return self._copies(nbytes) * nbytes

    def _make(self, layout: WeightLayout | None) -> list[Block]:
        if self._packable is None:
            return []
        name = self._packable.name
        weight = self.arrays[name]
        if layout is None:
            return [self._blocks[name], *(share(weight) for _ in range(self._copies(weight.nbytes) - 1))]
        experts, n, k = weight.shape
        nbytes = layout.packed_words(experts, n, k) * _WORD_BYTES
        first = Block(SharedRegion(nbytes, advised=True), nbytes)
        packed = first.array(packed_dtype(layout), packed_shape(layout, (experts, n, k)))
        pack(weight, layout, packed)
        return [first, *(share(packed, advised=True) for _ in range(self._copies(nbytes) - 1))]

    def _drop(self, blocks: Iterable[Block]) -> None:
        declared = set(self._blocks.values())
        self._release(block.region for block in blocks if block not in declared)


def declared_bytes(tensors: Sequence[TensorSpec]) -> int:
    """Bytes of all tensors of the role ``weight`` as the op declares them; their dims are constants."""
    return sum(
        math.prod(int(dim) for dim in tensor.dims) * np.dtype(DTYPES[tensor.dtype]).itemsize
        for tensor in tensors
        if tensor.role == "weight"
    )
