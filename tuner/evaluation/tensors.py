"""Sizes, shapes and guards of a call, wherever its tensors lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import WORKSPACE, Recipe, TensorSpec
from tilewright.codegen.recipe.resolve import Place, refused_guards
from tilewright.errors import TilewrightError

SOMEWHERE = 1 << 20
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


def refusal(recipe: Recipe, sizes: Mapping[str, int], place: Place, alignment: int) -> str | None:
    """Why a guard refuses ``sizes``, in words; None when all of them hold.

    A guard on an address is judged by what is known of addresses: they are multiples of ``alignment``.
    """
    names = {*(tensor.name for tensor in recipe.tensors), WORKSPACE}
    for guard in recipe.guards:
        if parsed(guard.expression).symbols & names and (guard.expression not in names or alignment % guard.multiple):
            return f"{guard.expression} is not known to be a multiple of {guard.multiple} wherever tensors are put"
    refusals = refused_guards(recipe, sizes, dict.fromkeys(names, SOMEWHERE), place)
    return str(refusals[0]) if refusals else None
