"""Problems of an op as tensors on the device, in the order in which a call takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tilewright.codegen.ops.base import Arrays, OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.runtime.calls.binding import TORCH_DTYPES

DEVICE = torch.device("cuda", 0)
SEED = 1


@dataclass(frozen=True)
class DeviceCall:
    """Tensors of one call."""

    inputs: Arrays
    """What the tensors were made from."""
    outputs: Mapping[str, torch.Tensor]
    passed: tuple[torch.Tensor | None, ...]
    """All but the weights, in order; None for an absent optional one."""


def device_call(op: OpDeclaration[Any, Any], problem: Problem) -> DeviceCall:
    """A call of ``problem``, its inputs drawn by :data:`SEED`."""
    inputs = op.inputs(problem, SEED)
    specs = problem.signature.tensors()
    sizes = dict(problem.output_sizes)
    for spec in specs:
        if spec.name in inputs:
            lengths = zip(spec.dims, inputs[spec.name].shape, strict=True)
            sizes.update({dim: length for dim, length in lengths if isinstance(dim, str)})
    tensors = {spec.name: on_device(inputs[spec.name], spec.dtype) for spec in specs if spec.name in inputs}
    outputs = {
        spec.name: torch.empty(
            [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims],
            dtype=TORCH_DTYPES[spec.dtype],
            device=DEVICE,
        )
        for spec in specs
        if spec.role == "output"
    }
    passed = tuple({**tensors, **outputs}.get(spec.name) for spec in specs if spec.role != "weight")
    return DeviceCall(inputs, outputs, passed)


def device_weights(signature: Any, weights: Arrays) -> dict[str, torch.Tensor]:
    """Weights as the op declares them."""
    specs = {spec.name: spec for spec in signature.tensors()}
    return {name: on_device(array, specs[name].dtype) for name, array in weights.items()}


def on_device(array: np.ndarray, dtype: str) -> torch.Tensor:
    """``array`` there, in the dtype that calls take."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(TORCH_DTYPES[dtype]).to(DEVICE)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """What references are compared with: floats as float32."""
    here = tensor.cpu()
    return (here.float() if here.is_floating_point() else here).numpy()
