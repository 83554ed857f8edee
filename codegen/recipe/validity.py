"""What a recipe must be before anything is called by it: checked once, when it is read and when it is bound."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import (
    FORMAT_VERSION,
    SM_COUNT,
    THREADS,
    WORKSPACE,
    Argument,
    Launch,
    Recipe,
    TensorSpec,
    packable,
)
from tilewright.errors import TilewrightError
from tilewright.structuring import StructureError, structure

_RESERVED = frozenset({THREADS, SM_COUNT, WORKSPACE})
_LARGEST = (1 << 63) - 1
_DIMENSIONS = 3
"""Of a grid."""


def read_recipe(data: Mapping[str, Any]) -> Recipe:
    """Recipe from its JSON form.

    Raises:
        TilewrightError: for another format, and for what is missing, unknown, of another type or impossible.

    """
    if not isinstance(data, Mapping):
        raise TilewrightError(f"the recipe is a {type(data).__name__}; expected an object")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise TilewrightError(f"the recipe has format {version}; this tilewright reads {FORMAT_VERSION}, so tune again")
    try:
        recipe = structure(Recipe, data)
    except StructureError as error:
        raise TilewrightError(f"the recipe cannot be read ({error}); tune again") from error
    validate(recipe)
    return recipe


def validate(recipe: Recipe) -> None:
    """Check all that can be known of ``recipe`` before it is called.

    Raises:
        TilewrightError: for names that are unknown or mean two things, expressions outside the grammar, guards that
            nothing can pass, launches that are half a GPU's, and offsets without a weight to begin at.

    """
    names = [tensor.name for tensor in recipe.tensors]
    for name in (*names, *recipe.sizes):
        if not name.isidentifier() or name in _RESERVED:
            raise TilewrightError(f"the recipe calls a tensor or a size {name!r}, which expressions cannot name")
    if twice := [name for name in names if names.count(name) > 1 or name in recipe.sizes]:
        raise TilewrightError(f"the recipe gives the name {twice[0]!r} to two things; a tensor's is its own")
    if recipe.size_name not in recipe.sizes:
        raise TilewrightError(f"the recipe picks by the size {recipe.size_name!r}, which none of its tensors has")
    values = {*recipe.sizes, THREADS, SM_COUNT}
    for tensor in recipe.tensors:
        _validate_tensor(tensor, recipe)
    _validate_layout(recipe)
    _require(recipe.workspace_bytes, values, "workspace_bytes")
    for guard in recipe.guards:
        _require(guard.expression, {*values, *names, WORKSPACE}, "a guard")
        if not 1 <= guard.multiple <= _LARGEST:
            raise TilewrightError(
                f"a guard of the recipe wants {guard.expression!r} to be a multiple of {guard.multiple}; "
                f"expected 1 to {_LARGEST}"
            )
    for launch in recipe.launches:
        _validate_launch(launch, recipe, values)


def unused_tensors(recipe: Recipe) -> tuple[str, ...]:
    """Tensors that are passed to no launch. A kernel of ours takes all that its op has."""
    used = {argument.source for launch in recipe.launches for argument in launch.arguments if argument.kind == "tensor"}
    return tuple(tensor.name for tensor in recipe.tensors if tensor.name not in used)


def _validate_tensor(tensor: TensorSpec, recipe: Recipe) -> None:
    for dim in tensor.dims:
        if isinstance(dim, int) and not 0 <= dim <= _LARGEST:
            raise TilewrightError(f"the recipe's tensor {tensor.name} has a dimension of {dim}")
    if tensor.bound:
        _require(tensor.bound, recipe.sizes, f"the bound of {tensor.name}")
    if tensor.lengths and tensor.lengths not in [each.name for each in recipe.tensors]:
        raise TilewrightError(f"the recipe's tensor {tensor.name} has its lengths in {tensor.lengths!r}: no tensor")


def _validate_layout(recipe: Recipe) -> None:
    layout = recipe.weight_layout
    if layout is not None and packable(recipe.tensors) is None:
        raise TilewrightError(f"the recipe has the weight layout {layout.key}, but no weight of three dimensions")
    if isinstance(layout, WeightLayout) and (layout.columns < 1 or layout.halves < 1 or layout.run < 0):
        raise TilewrightError(f"the recipe has the weight layout {layout.key}, which holds no columns")


def _validate_launch(launch: Launch, recipe: Recipe, values: Collection[str]) -> None:
    if not launch.entry.isidentifier():
        raise TilewrightError(f"the recipe launches {launch.entry!r}, which is no name of an entry")
    if bool(launch.grid) != bool(launch.block) or (launch.cluster and not launch.grid):
        raise TilewrightError(f"the recipe's launch of {launch.entry} needs both a grid and a block of threads")
    if max(map(len, (launch.grid, launch.block, launch.cluster))) > _DIMENSIONS:
        raise TilewrightError(f"the recipe's launch of {launch.entry} has more than {_DIMENSIONS} dimensions")
    if (launch.programmatic or launch.cooperative) and not launch.grid:
        raise TilewrightError(f"the recipe's launch of {launch.entry} has no grid to be programmatic or cooperative")
    if launch.hidden_arguments < 0:
        raise TilewrightError(f"the recipe's launch of {launch.entry} has {launch.hidden_arguments} hidden arguments")
    for text in (*launch.grid, *launch.block, *launch.cluster, launch.shared_memory_bytes):
        _require(text, values, f"the launch of {launch.entry}")
    for argument in launch.arguments:
        _validate_argument(argument, launch, recipe, values)


def _validate_argument(argument: Argument, launch: Launch, recipe: Recipe, values: Collection[str]) -> None:
    where = f"the launch of {launch.entry}"
    match argument.kind:
        case "tensor":
            if argument.source not in [tensor.name for tensor in recipe.tensors]:
                raise TilewrightError(f"{where} takes {argument.source!r}, which is no tensor of the recipe")
        case "size":
            _require(argument.source, values, where)
        case "workspace" | "scales":
            if argument.source:
                _require(argument.source, values, where)
        case unknown:
            raise TilewrightError(f"{where} takes an argument of the kind {unknown!r}, which this tilewright lacks")
    if argument.kind == "scales":
        weight = packable(recipe.tensors)
        if weight is None or weight.optional:
            raise TilewrightError(f"{where} takes scales behind a packed weight, and the recipe has none for certain")
    if argument.map is not None:
        shape, box = argument.map.shape, argument.map.box
        _require_all(shape, values, f"a tensor map of {where}")
        if argument.kind == "size" or not shape or argument.map.element_bytes < 1 or len(box) not in (0, len(shape)):
            raise TilewrightError(f"{where} takes a tensor map that needs an address, a shape, elements and their box")


def _require_all(texts: Iterable[str], known: Collection[str], where: str) -> None:
    for text in texts:
        _require(text, known, where)


def _require(text: str, known: Collection[str], where: str) -> None:
    if unknown := sorted(parsed(text).symbols - set(known)):
        raise TilewrightError(f"recipe expression {text!r} ({where}) reads unknown sizes {unknown}")
