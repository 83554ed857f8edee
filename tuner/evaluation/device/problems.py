"""A problem's data for a device, and what its result must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.numbers.dtypes import ITEMSIZE, from_bytes
from tilewright.codegen.ops.base import Arrays, OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.tuner.evaluation.device.session import Bytes, DeviceBuffer
from tilewright.tuner.evaluation.device.weights import to_content
from tilewright.tuner.evaluation.tensors import outputs_of, shape_of, sizes_of

_REFERENCE_ITEMSIZE = 8


@dataclass(frozen=True, eq=False)
class DeviceInputs:
    """One draw of a problem's inputs, with room for its outputs."""

    tensors: Mapping[str, DeviceBuffer]
    """Inputs and outputs by name, without weights."""
    outputs: tuple[TensorSpec, ...]
    sizes: Mapping[str, int]

    def result(self, spec: TensorSpec, data: Bytes) -> Any:
        """An output from its bytes: floats as float32."""
        return from_bytes(data.tobytes(), spec.dtype).reshape(shape_of(spec, self.sizes))


@dataclass(frozen=True, eq=False)
class DeviceProblem:
    """A problem ready to be run. The sets differ in their values and routing; the references are the first one's."""

    problem: Problem
    sets: tuple[DeviceInputs, ...]
    inputs: Arrays
    """Of the first set, as the reference reads them."""
    references: dict[str, Arrays]
    """What must come out, every output by name, by precision of the weights; made when they are first needed."""

    @property
    def buffers(self) -> tuple[DeviceBuffer, ...]:
        """All memory of the device that the problem takes."""
        return tuple(buffer for inputs in self.sets for buffer in inputs.tensors.values())

    @property
    def nbytes(self) -> int:
        """Memory that the problem takes here."""
        contents = sum(buffer.content.nbytes for buffer in self.buffers if buffer.content is not None)
        arrays = [self.inputs, *self.references.values()]
        return contents + sum(array.nbytes for each in arrays for array in each.values())


def expected_bytes(op: OpDeclaration[Any, Any], problem: Problem, inputs: Arrays) -> tuple[int, int]:
    """Memory that a problem takes for one set of inputs like these: on this machine, and on the device."""
    sizes, outputs = _layout(op, problem, inputs)
    elements = {spec.name: math.prod(shape_of(spec, sizes)) for spec in outputs}
    written = sum(elements[spec.name] * ITEMSIZE[spec.dtype] for spec in outputs)
    given = sum(array.nbytes for array in inputs.values())
    return 2 * given + _REFERENCE_ITEMSIZE * sum(elements.values()) + written, given + written


def place_inputs(op: OpDeclaration[Any, Any], problem: Problem, inputs: Arrays) -> DeviceInputs:
    """Buffers for one draw of inputs.

    Raises:
        TilewrightError: when they contradict the op's declaration.

    """
    sizes, outputs = _layout(op, problem, inputs)
    dtypes = {spec.name: spec.dtype for spec in op.tensors(problem.signature)}
    tensors = {}
    for name, array in inputs.items():
        content = to_content(array, dtypes[name])
        tensors[name] = DeviceBuffer(content.nbytes, content)
    for spec in outputs:
        tensors[spec.name] = DeviceBuffer(math.prod(shape_of(spec, sizes)) * ITEMSIZE[spec.dtype])
    return DeviceInputs(tensors, outputs, sizes)


def _layout(
    op: OpDeclaration[Any, Any], problem: Problem, inputs: Arrays
) -> tuple[dict[str, int], tuple[TensorSpec, ...]]:
    """Sizes and outputs."""
    tensors = op.tensors(problem.signature)
    sizes = sizes_of(tensors, {name: array.shape for name, array in inputs.items()})
    return {**sizes, **problem.output_sizes}, outputs_of(tensors)
