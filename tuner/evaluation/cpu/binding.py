"""From a kernel's recipe and the tensors of a problem to a program that the worker can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import WORKSPACE, Recipe, TensorSpec
from tilewright.codegen.recipe.resolve import Place, ResolvedArgument, refused_guards, resolve
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.host_so import require_host
from tilewright.tuner.evaluation.cpu.mapping import ALIGNMENT
from tilewright.tuner.evaluation.cpu.session import Program
from tilewright.tuner.evaluation.cpu.shared_memory import Block, Pointer
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

_SOMEWHERE = 1 << 20
"""In place of addresses, which only the worker knows: aligned as all of them are."""


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


def refusal(recipe: Recipe, sizes: Mapping[str, int], threads: int) -> str | None:
    """Why a guard refuses ``sizes``, in words; None when all of them hold.

    A guard on an address is judged by what is known of addresses here: they are multiples of 64.
    """
    names = {*(tensor.name for tensor in recipe.tensors), WORKSPACE}
    for guard in recipe.guards:
        if parsed(guard.expression).symbols & names and (guard.expression not in names or ALIGNMENT % guard.multiple):
            return f"{guard.expression} is not known to be a multiple of {guard.multiple} wherever tensors are put"
    refusals = refused_guards(recipe, sizes, dict.fromkeys(names, _SOMEWHERE), Place(threads=threads))
    return str(refusals[0]) if refusals else None


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

    Raises:
        TilewrightError: when the kernel is one for GPUs, cannot be called with these sizes, or refuses them.

    """
    recipe = kernel.recipe
    require_host(recipe)
    if refused := refusal(recipe, sizes, threads):
        raise TilewrightError(f"kernel {kernel.key} refuses these sizes: {refused}")
    blocks = {**tensors, WORKSPACE: workspace}
    call = resolve(recipe, sizes, dict.fromkeys(blocks, _SOMEWHERE), Place(threads=threads))

    def passed(argument: ResolvedArgument) -> int | Pointer:
        return Pointer(blocks[argument.buffer], argument.offset) if argument.buffer else argument.value

    launches = tuple((launch.entry, tuple(map(passed, launch.arguments))) for launch in call.launches)
    outputs = tuple(tensors[spec.name] for spec in outputs_of(recipe.tensors))
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
