"""Where the elements of a tensor lie: what checks of a call read, whatever library the tensor is of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

_OVERLAP_EFFORT = 10_000
"""Work that finding out whether two strided tensors share an element is worth; beyond it they count as overlapping."""


@dataclass(frozen=True)
class StridedMemory:
    """Elements of ``itemsize`` bytes at an address; ``strides`` are in elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> StridedMemory:
        """That of a plain tensor of torch; it is not looked at."""
        return cls(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.element_size())

    @cached_property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether elements lie in row-major order with no gaps."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length == 0:
                return True
            if length != 1 and stride != expected:
                return self.elements == 0
            expected *= length
        return True

    @property
    def is_aligned(self) -> bool:
        """Whether every element lies at a multiple of its size."""
        return self.address % self.itemsize == 0

    @property
    def overlaps_itself(self) -> bool:
        """Whether two elements may lie at one address: what is written to one is read from the other."""
        reach = 1
        for stride, length in sorted(zip(self.strides, self.shape, strict=True)):
            if length <= 1:
                continue
            if stride < reach:
                return self.elements > 0
            reach = stride * (length - 1) + reach
        return False

    def overlaps(self, other: StridedMemory) -> bool:
        """Whether an element of both may lie at one address; nothing is read."""
        if self.elements == 0 or other.elements == 0:
            return False
        try:
            # The stubs know only the two special values; numpy takes any effort.
            return np.shares_memory(self._described, other._described, max_work=_OVERLAP_EFFORT)  # type: ignore[arg-type]
        except np.exceptions.TooHardError:
            return True

    @property
    def _described(self) -> Any:
        """An array of numpy over these addresses, of which nobody may read an element."""
        return np.asarray(_Interface(self))


class _Interface:
    def __init__(self, memory: StridedMemory) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (memory.address, False),
            "shape": memory.shape,
            "strides": tuple(stride * memory.itemsize for stride in memory.strides),
            "typestr": f"|V{memory.itemsize}",
        }
