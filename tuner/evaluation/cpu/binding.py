"""From a kernel's recipe and the tensors of a problem to a program that the worker can run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tilewright.codegen.recipe.model import WORKSPACE
from tilewright.codegen.recipe.resolve import Place, ResolvedArgument, resolve
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.host_so import require_host
from tilewright.tuner.evaluation.cpu.mapping import ALIGNMENT
from tilewright.tuner.evaluation.cpu.session import Program
from tilewright.tuner.evaluation.cpu.shared_memory import Block, Pointer
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.evaluation.tensors import SOMEWHERE, outputs_of, refusal

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
    place = Place(threads=threads)
    if refused := refusal(recipe, sizes, place, ALIGNMENT):
        raise TilewrightError(f"kernel {kernel.key} refuses these sizes: {refused}")
    blocks = {**tensors, WORKSPACE: workspace}
    call = resolve(recipe, sizes, dict.fromkeys(blocks, SOMEWHERE), place)

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
