"""A signature's weights in shared memory: as the op declares them, and packed for the kernels in the race."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.runtime.weights.packing import pack_array, packed_dtype, packed_shape
from tilewright.tuner.evaluation.cpu.binding import DTYPES
from tilewright.tuner.evaluation.cpu.shared_memory import Block, SharedRegion, share
from tilewright.tuner.evaluation.weight_store import Copies, LayoutStore

Release = Callable[[Iterable[SharedRegion]], None]

_WORD_BYTES = 4
_ROUNDING_COLUMNS = 16
"""Of panels that are made only to be read back."""


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


class WeightStore(LayoutStore[WeightLayout, Block]):
    """The weights in shared memory.

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
        self._release = release
        self._blocks = {name: share(array) for name, array in arrays.items()}
        shared = {name: block.array(arrays[name].dtype, arrays[name].shape) for name, block in self._blocks.items()}
        super().__init__(tensors, shared, copies=copies, capacity_bytes=capacity_bytes)

    def _declared(self) -> Mapping[str, Block]:
        return self._blocks

    def _declared_bytes(self, weight: NDArray[Any]) -> int:
        return weight.nbytes

    def _packed_bytes(self, weight: NDArray[Any], layout: WeightLayout) -> int:
        experts, n, k = weight.shape
        return layout.packed_words(experts, n, k) * _WORD_BYTES

    def _further(self, weight: NDArray[Any], count: int) -> list[Block]:
        return [share(weight) for _ in range(count)]

    def _pack(self, weight: NDArray[Any], layout: WeightLayout, count: int) -> list[Block]:
        nbytes = self._packed_bytes(weight, layout)
        experts, n, k = weight.shape
        first = Block(SharedRegion(nbytes, advised=True), nbytes)
        packed = first.array(packed_dtype(layout), packed_shape(layout, (experts, n, k)))
        pack(weight, layout, packed)
        return [first, *(share(packed, advised=True) for _ in range(count - 1))]

    def _round(self, weight: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
        return round_weight(weight, precision)

    def _free(self, memory: Iterable[Block]) -> None:
        self._release(block.region for block in memory)


def declared_bytes(tensors: Sequence[TensorSpec]) -> int:
    """Bytes of all tensors of the role ``weight`` as the op declares them; their dims are constants."""
    return sum(
        math.prod(int(dim) for dim in tensor.dims) * np.dtype(DTYPES[tensor.dtype]).itemsize
        for tensor in tensors
        if tensor.role == "weight"
    )
