"""A problem's data in shared memory, and what its result must be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.base import Arrays, OpDeclaration, Problem
from tilewright.codegen.recipe import TensorSpec
from tilewright.tuner.evaluation.arena import Block, SharedRegion, share
from tilewright.tuner.evaluation.binding import DTYPES, output_of, shape_of, sizes_of

_REFERENCE_ITEMSIZE = 8


@dataclass(frozen=True, eq=False)
class InputSet:
    """One draw of a problem's inputs, with room for its output."""

    tensors: Mapping[str, Block]
    """Inputs and the output by name, without weights."""
    output: Block
    output_dtype: type[np.generic]
    output_shape: tuple[int, ...]
    sizes: Mapping[str, int]

    def inputs(self, tensors: Sequence[TensorSpec]) -> Arrays:
        """The draw as arrays that share its memory."""
        return {
            spec.name: self.tensors[spec.name].array(DTYPES[spec.dtype], shape_of(spec, self.sizes))
            for spec in tensors
            if spec.role == "input" and spec.name in self.tensors
        }

    def result(self) -> NDArray[Any]:
        """What a kernel wrote."""
        return self.output.array(self.output_dtype, self.output_shape)


@dataclass(frozen=True, eq=False)
class ProblemData:
    """A problem ready to be run. The sets differ in their values and routing; the references are the first one's."""

    problem: Problem
    sets: tuple[InputSet, ...]
    references: dict[str, NDArray[np.float64]]
    """What must come out, by precision of the weights; made when they are first needed."""

    @property
    def regions(self) -> tuple[SharedRegion, ...]:
        """All shared memory of the problem."""
        return tuple(block.region for inputs in self.sets for block in inputs.tensors.values())

    @property
    def nbytes(self) -> int:
        """Memory that the problem takes."""
        return sum(region.file_bytes for region in self.regions) + sum(
            reference.nbytes for reference in self.references.values()
        )


def expected_bytes(op: OpDeclaration[Any, Any], problem: Problem, inputs: Arrays) -> int:
    """Memory that a problem takes for one set of inputs like these and its reference."""
    _, output, shape = _layout(op, problem, inputs)
    item_bytes = np.dtype(DTYPES[output.dtype]).itemsize + _REFERENCE_ITEMSIZE
    return sum(array.nbytes for array in inputs.values()) + math.prod(shape) * item_bytes


def share_inputs(op: OpDeclaration[Any, Any], problem: Problem, inputs: Arrays) -> InputSet:
    """Put one draw of inputs in shared memory.

    Raises:
        TilewrightError: when they contradict the op's declaration, or memory is short.

    """
    sizes, output, shape = _layout(op, problem, inputs)
    dtype = DTYPES[output.dtype]
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    block = Block(SharedRegion(nbytes), nbytes)
    tensors = {name: share(array) for name, array in inputs.items()}
    return InputSet({**tensors, output.name: block}, block, dtype, shape, sizes)


def _layout(
    op: OpDeclaration[Any, Any], problem: Problem, inputs: Arrays
) -> tuple[dict[str, int], TensorSpec, tuple[int, ...]]:
    """Sizes, the output and its shape."""
    tensors = op.tensors(problem.signature)
    sizes = sizes_of(tensors, {name: array.shape for name, array in inputs.items()})
    output = output_of(tensors)
    return sizes, output, shape_of(output, sizes)
