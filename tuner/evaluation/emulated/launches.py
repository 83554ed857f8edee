"""What the interpreter is asked to run: a recipe's launches, and what of memory each may touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.recipe.resolve import Place, ResolvedArgument, ResolvedLaunch, resolve, workspace_bytes
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.tensors import SOMEWHERE

EMULATED_SM_COUNT = 3
"""Multiprocessors that persistent kernels see: few, so that every program goes through several tiles."""

EMULATED_PLACE = Place(threads=1, sm_count=EMULATED_SM_COUNT)


@dataclass(frozen=True)
class EmulatedBuffer:
    """Memory of one tensor, or of the workspace."""

    nbytes: int
    written: bool
    """Whether kernels may write it."""


def sizes_of(recipe: Recipe, tensors: Arrays) -> dict[str, int]:
    """Value of every size that ``tensors`` show; weights have constant shapes and may be packed."""
    sizes: dict[str, int] = {}
    for spec in recipe.tensors:
        if spec.name in tensors and spec.role != "weight":
            lengths = zip(spec.dims, tensors[spec.name].shape, strict=True)
            sizes.update({dim: length for dim, length in lengths if isinstance(dim, str)})
    return sizes


def emulated_workspace_bytes(recipe: Recipe, sizes: Mapping[str, int]) -> int:
    """Bytes of workspace that a run needs.

    Raises:
        TilewrightError: when the recipe cannot be evaluated.

    """
    return workspace_bytes(recipe, sizes, EMULATED_PLACE)


def describe_launches(
    recipe: Recipe, entries: Sequence[EntrySpec], sizes: Mapping[str, int], buffers: Mapping[str, EmulatedBuffer]
) -> list[dict[str, Any]]:
    """The launches as the worker reads them (emulated/worker.py), in order.

    Args:
        recipe: of the kernel.
        entries: what the builder is told of each launch's entry: types of its arguments, and its constants.
        sizes: every dynamic size.
        buffers: of every tensor that there is, and ``workspace``.

    Raises:
        TilewrightError: when the recipe cannot be evaluated for these sizes, or a guard of it refuses them.

    """
    call = resolve(recipe, sizes, dict.fromkeys(buffers, SOMEWHERE), EMULATED_PLACE)
    if call.refusals:
        raise TilewrightError(f"a guard refuses the problem: {call.refusals[0]}")
    parts: dict[str, set[int]] = {name: {buffer.nbytes} for name, buffer in buffers.items()}
    for launch in call.launches:
        for argument in launch.arguments:
            if argument.buffer:
                parts[argument.buffer].add(argument.offset)
    return [_describe(launch, entry, buffers, parts) for launch, entry in zip(call.launches, entries, strict=True)]


def _describe(
    launch: ResolvedLaunch,
    entry: EntrySpec,
    buffers: Mapping[str, EmulatedBuffer],
    parts: Mapping[str, set[int]],
) -> dict[str, Any]:
    """One launch, with what its entry may touch: every tensor, and every part of workspace and weight by itself."""
    described: list[dict[str, Any]] = []
    extents = []
    for argument, (name, kind) in zip(launch.arguments, entry.arguments, strict=True):
        described.append(_argument(argument, kind))
        if not argument.buffer:
            continue
        end = min((part for part in parts[argument.buffer] if part > argument.offset), default=argument.offset)
        extents.append(
            {
                "name": name,
                "buffer": argument.buffer,
                "offset": argument.offset,
                "nbytes": end - argument.offset,
                "writable": buffers[argument.buffer].written,
            }
        )
    return {
        "entry": launch.entry,
        "grid": list(launch.grid or ()),
        "arguments": described,
        "constants": dict(entry.constants),
        "extents": extents,
    }


def _argument(argument: ResolvedArgument, kind: str) -> dict[str, Any]:
    if not argument.buffer:
        return {"value": argument.value}
    address = {"buffer": argument.buffer, "offset": argument.offset, "type": kind}
    return {**address, "shape": list(argument.map.shape)} if argument.map else address
