"""A signature's weights as a device's kernels read them: packed by the numpy twin of what the runtime does there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.numbers.dtypes import ITEMSIZE, to_bytes
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.numbers.precisions import find_precision
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.runtime.weights.row_packing import pack_rows, round_rows
from tilewright.tuner.evaluation.device.session import Bytes, DeviceBuffer
from tilewright.tuner.evaluation.weight_store import Copies, LayoutStore

Release = Callable[[Iterable[DeviceBuffer]], None]


class DeviceWeights(LayoutStore[RowLayout, DeviceBuffer]):
    """The weights in buffers, which get memory of the device when a program first needs them.

    Args:
        tensors: of the op's calls.
        arrays: what the op made for the role ``weight``.
        copies: of the packable weight, by its bytes in a layout, so that a rotation of them exceeds the cache.
        capacity_bytes: for all layouts together; what a single request needs is always granted.
        release: called with buffers that are no longer used.

    """

    def __init__(
        self, tensors: Sequence[TensorSpec], arrays: Arrays, *, copies: Copies, capacity_bytes: int, release: Release
    ) -> None:
        super().__init__(tensors, arrays, copies=copies, capacity_bytes=capacity_bytes)
        self._release = release
        self._dtypes = {spec.name: spec.dtype for spec in tensors}
        self._buffers = {name: _buffer(to_content(array, self._dtypes[name])) for name, array in arrays.items()}

    def _declared(self) -> Mapping[str, DeviceBuffer]:
        return self._buffers

    def _declared_bytes(self, weight: NDArray[Any]) -> int:
        return weight.size * self._itemsize

    def _packed_bytes(self, weight: NDArray[Any], layout: RowLayout) -> int:
        experts, n, k = weight.shape
        return layout.packed_bytes(experts, n, k)

    def _further(self, weight: NDArray[Any], count: int) -> list[DeviceBuffer]:
        del weight
        declared = self._buffers[self._name]
        return [DeviceBuffer(declared.nbytes, declared.content) for _ in range(count)]

    def _pack(self, weight: NDArray[Any], layout: RowLayout, count: int) -> list[DeviceBuffer]:
        content = pack_rows(weight, layout)
        return [_buffer(content) for _ in range(count)]

    def _round(self, weight: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
        return round_rows(weight, find_precision(precision), self._dtypes[self._name])

    def _free(self, memory: Iterable[DeviceBuffer]) -> None:
        self._release(memory)

    @property
    def _name(self) -> str:
        assert self._packable is not None
        return self._packable.name

    @property
    def _itemsize(self) -> int:
        return ITEMSIZE[self._dtypes[self._name]]


def declared_elements(tensors: Sequence[TensorSpec]) -> int:
    """Elements of all tensors of the role ``weight``; their dims are constants."""
    return sum(math.prod(int(dim) for dim in spec.dims) for spec in tensors if spec.role == "weight")


def to_content(array: NDArray[Any], dtype: str) -> Bytes:
    """Elements of a tensor as the device's memory holds them."""
    return np.frombuffer(to_bytes(array, dtype), np.uint8)


def _buffer(content: Bytes) -> DeviceBuffer:
    return DeviceBuffer(content.nbytes, content)
