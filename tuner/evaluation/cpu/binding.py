"""From a kernel's recipe and the tensors of a problem to a program that the worker can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tilewright.codegen.recipe.expressions import IntExpr
from tilewright.codegen.recipe.model import Argument, Recipe, TensorSpec
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.cpu.session import Program
from tilewright.tuner.evaluation.cpu.shared_memory import Block
from tilewright.tuner.evaluation.outcome import BuiltKernel

DTYPES: dict[str, type[np.generic]] = {
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
    "int8": np.int8,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
}
"""Of tensors that can be measured here, by their name in a :class:`TensorSpec`."""


def sizes_of(tensors: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Value of every size name that the inputs show; ``shapes`` are those of the inputs.

    Raises:
        TilewrightError: when a shape contradicts its spec, or an input that is not optional is missing.

    """
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.role != "input" or (tensor.optional and tensor.name not in shapes):
            continue
        shape = shapes.get(tensor.name)
        if shape is not None and len(shape) == len(tensor.dims):
            for dim, size in zip(tensor.dims, shape, strict=True):
                if isinstance(dim, str):
                    sizes.setdefault(dim, size)
            if shape == shape_of(tensor, sizes):
                continue
        raise TilewrightError(f"the op made {tensor.name!r} of shape {shape}, but it declares {tensor.dims}")
    return sizes


def outputs_of(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors that a call writes."""
    return tuple(tensor for tensor in tensors if tensor.role == "output")


def shape_of(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of ``tensor`` for ``sizes``."""
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims)


def broken_guard(recipe: Recipe, sizes: Mapping[str, int]) -> str | None:
    """The first guard that refuses ``sizes``, in words; None when all of them hold."""
    for guard in recipe.guards:
        value = IntExpr(guard.expression).evaluate(sizes)
        if value % guard.multiple:
            return f"{guard.expression} = {value} is no multiple of {guard.multiple}"
    return None


def bind(
    kernel: BuiltKernel,
    tensors: Mapping[str, Block],
    workspace: Block,
    sizes: Mapping[str, int],
    *,
    threads: int,
    fork: bool = True,
    poison_workspace: bool = False,
) -> Program:
    """Prepare one call.

    Args:
        kernel: what to call.
        tensors: every tensor by name; optional ones may be missing.
        workspace: exactly as long as the recipe asks for.
        sizes: every dynamic size; ``threads`` is added here.
        threads: that the kernel is told to use.
        fork: whether it is given the means to.
        poison_workspace: fill the workspace with NaN before the call, if the recipe does not ask for zeros.

    """
    recipe = kernel.recipe
    all_sizes = {**sizes, "threads": threads}
    outputs = tuple(tensors[spec.name] for spec in outputs_of(recipe.tensors))

    def value(argument: Argument) -> int | Block:
        match argument.kind:
            case "tensor":
                return tensors.get(argument.source, 0)
            case "workspace":
                return workspace
            case _:
                return IntExpr(argument.source).evaluate(all_sizes)

    launches = tuple((launch.entry, tuple(map(value, launch.arguments))) for launch in recipe.launches)
    zero = (workspace,) if recipe.workspace_zeroed else ()
    poison = (*outputs, workspace) if poison_workspace and not zero else outputs
    return Program(
        path=kernel.path,
        abi_version=recipe.abi_version,
        launches=launches,
        threads=threads,
        fork=fork,
        poison=poison,
        zero=zero,
        writable=frozenset(block.region.id for block in (*outputs, workspace)),
    )
