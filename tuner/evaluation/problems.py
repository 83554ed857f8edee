"""A problem's data in shared memory, and what its result must be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.codegen.ops.base import Arrays, OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.tuner.evaluation.cpu.binding import DTYPES
from tilewright.tuner.evaluation.cpu.shared_memory import Block, SharedRegion, share
from tilewright.tuner.evaluation.tensors import outputs_of, shape_of, sizes_of

_REFERENCE_ITEMSIZE = 8


@dataclass(frozen=True, eq=False)
class InputSet:
    """One draw of a problem's inputs, with room for its outputs."""

    tensors: Mapping[str, Block]
    """Inputs and outputs by name, without weights."""
    outputs: tuple[TensorSpec, ...]
    sizes: Mapping[str, int]

    def inputs(self, tensors: Sequence[TensorSpec]) -> Arrays:
        """The draw as arrays that share its memory."""
        return {
            spec.name: self.tensors[spec.name].array(DTYPES[spec.dtype], shape_of(spec, self.sizes))
            for spec in tensors
            if spec.role == "input" and spec.name in self.tensors
        }

    def output_blocks(self) -> dict[str, Block]:
        """The memory of every output by name."""
        return {spec.name: self.tensors[spec.name] for spec in self.outputs}

    def results(self) -> Arrays:
        """What a kernel wrote, by name."""
        return {
            spec.name: self.tensors[spec.name].array(DTYPES[spec.dtype], shape_of(spec, self.sizes))
            for spec in self.outputs
        }


@dataclass(frozen=True, eq=False)
class ProblemData:
    """A problem ready to be run. The sets differ in their values and routing; the references are the first one's."""

    problem: Problem
    sets: tuple[InputSet, ...]
    references: dict[str, Arrays]
    """What must come out, every output by name, by precision of the weights; made when they are first needed."""

    @property
    def regions(self) -> tuple[SharedRegion, ...]:
        """All shared memory of the problem."""
        return tuple(block.region for inputs in self.sets for block in inputs.tensors.values())

    @property
    def nbytes(self) -> int:
        """Memory that the problem takes."""
        return sum(region.file_bytes for region in self.regions) + sum(
            array.nbytes for arrays in self.references.values() for array in arrays.values()
        )


def expected_bytes(op: OpDeclaration[Any, Any], problem: Problem, inputs: Arrays) -> int:
    """Memory that a problem takes for one set of inputs like these and its reference."""
    sizes, outputs = _layout(op, problem, inputs)
    needed = sum(array.nbytes for array in inputs.values())
    for spec in outputs:
        needed += math.prod(shape_of(spec, sizes)) * (np.dtype(DTYPES[spec.dtype]).itemsize + _REFERENCE_ITEMSIZE)
    return needed


def share_inputs(op: OpDeclaration[Any, Any], problem: Problem, inputs: Arrays) -> InputSet:
    """Put one draw of inputs in shared memory.

    Raises:
        TilewrightError: when they contradict the op's declaration, or memory is short.

    """
    sizes, outputs = _layout(op, problem, inputs)
    tensors = {name: share(array) for name, array in inputs.items()}
    for spec in outputs:
        nbytes = math.prod(shape_of(spec, sizes)) * np.dtype(DTYPES[spec.dtype]).itemsize
        tensors[spec.name] = Block(SharedRegion(nbytes), nbytes)
    return InputSet(tensors, outputs, sizes)


def _layout(
    op: OpDeclaration[Any, Any], problem: Problem, inputs: Arrays
) -> tuple[dict[str, int], tuple[TensorSpec, ...]]:
    """Sizes and outputs."""
    tensors = op.tensors(problem.signature)
    sizes = sizes_of(tensors, {name: array.shape for name, array in inputs.items()})
    return {**sizes, **problem.output_sizes}, outputs_of(tensors)
