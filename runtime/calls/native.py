"""A binding as the plain tuples that the extension reads (runtime/native/description.h).

The extension is the twin of codegen/recipe/resolve.py: it gets all expressions compiled, and hands a call that it
cannot evaluate to the Python call, which says why.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import THREADS, WORKSPACE, Argument, Guard, Recipe, TensorSpec, packable
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import Binding, CallVariant
from tilewright.runtime.calls.pure import PureCall

_DLPACK_INT, _DLPACK_UINT, _DLPACK_FLOAT, _DLPACK_BFLOAT = 0, 1, 2, 4
_DLPACK_DTYPES = {
    "fp64": (_DLPACK_FLOAT, 64),
    "fp32": (_DLPACK_FLOAT, 32),
    "fp16": (_DLPACK_FLOAT, 16),
    "bf16": (_DLPACK_BFLOAT, 16),
    "int64": (_DLPACK_INT, 64),
    "int32": (_DLPACK_INT, 32),
    "int8": (_DLPACK_INT, 8),
    "uint8": (_DLPACK_UINT, 8),
}
_VALUE_CHECKS = {
    "none": 0,
    "offsets": 1,
    "index": 2,
    "slot": 3,
    "finite": 4,
    "logits": 5,
    "rising": 6,
    "length": 7,
    "pages": 8,
}
_POSITIONAL, _ADDRESS, _WORKSPACE, _SIZE = range(4)
_LARGEST = (1 << 63) - 1


def native_call(native: ModuleType, binding: Binding) -> Any:
    """``BoundCall`` of the extension for ``binding``.

    Raises:
        TilewrightError: when the binding has more tensors, dimensions, sizes, launches or arguments than the extension
            holds, or an expression that is nested too deeply.

    """
    try:
        return native.BoundCall(PureCall(binding), describe(binding))
    except (OverflowError, ValueError) as error:
        raise TilewrightError(f"{binding.name}: the compiled call layer cannot hold this kernel: {error}") from error


def describe(binding: Binding) -> tuple[Any, ...]:
    """``binding`` as nested tuples of integers."""
    bound_tensors = [tensor for tensor in binding.bound.values() if isinstance(tensor, Tensor)]
    return (
        len(binding.symbols),
        binding.symbols.index(binding.size_name),
        binding.symbols.index(THREADS),
        binding.outputs,
        binding.threads,
        binding.most_workspace_bytes,
        tuple(_tensor(binding, spec) for spec in binding.positional),
        tuple((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in bound_tensors),
        tuple(_variant(binding, variant) for variant in binding.variants),
    )


def _tensor(binding: Binding, spec: TensorSpec) -> tuple[Any, ...]:
    dims = tuple(-1 - binding.symbols.index(dim) if isinstance(dim, str) else dim for dim in spec.dims)
    bound = binding.program(spec.bound) if spec.bound else ()
    lengths = [each.name for each in binding.positional].index(spec.lengths) if spec.lengths else -1
    checked = _VALUE_CHECKS[spec.values]
    return (*_DLPACK_DTYPES[spec.dtype], spec.optional, checked, dims, bound, lengths, spec.page_size)


def _variant(binding: Binding, variant: CallVariant) -> tuple[Any, ...]:
    max_size = _LARGEST if variant.max_size is None else variant.max_size
    recipe = variant.recipe
    if recipe is None:
        return max_size, binding.program("0"), False, (), (), ()
    late = [guard for guard in recipe.guards if WORKSPACE in parsed(guard.expression).symbols]
    early = [guard for guard in recipe.guards if guard not in late]
    guards = [tuple(_guard(binding, variant, recipe, guard) for guard in some) for some in (early, late)]
    launches = tuple(
        (entry, tuple(_argument(binding, variant, recipe, argument) for argument in launch.arguments))
        for entry, launch in zip(variant.entries, recipe.launches, strict=True)
    )
    workspace_bytes = binding.program(recipe.workspace_bytes)
    return max_size, workspace_bytes, recipe.workspace_zeroed, launches, *guards


def _guard(binding: Binding, variant: CallVariant, recipe: Recipe, guard: Guard) -> tuple[tuple[int, ...], int]:
    """Its code: after the sizes come the addresses of the call's tensors in order, and of the workspace."""
    symbols = (*binding.symbols, *(spec.name for spec in binding.positional), WORKSPACE)
    passed_once = {
        tensor.name: binding.addresses[name]
        for tensor in recipe.tensors
        if (name := variant.aliases.get(tensor.name, tensor.name)) in binding.addresses
    }
    return parsed(guard.expression).program(symbols, passed_once), guard.multiple


def _argument(
    binding: Binding, variant: CallVariant, recipe: Recipe, argument: Argument
) -> tuple[int, int, tuple[int, ...]]:
    """Where an argument begins, with the code of its offset in bytes (none: 0); of a size, the code of its value."""
    offset = binding.program(argument.source) if argument.kind != "tensor" and argument.source else ()
    match argument.kind:
        case "workspace":
            return _WORKSPACE, 0, offset
        case "size":
            return _SIZE, 0, offset
        case "tensor":
            name = argument.source
        case "scales":
            weight = packable(recipe.tensors)
            assert weight is not None  # the recipe was found valid
            name = weight.name
    name = variant.aliases.get(name, name)
    if name in binding.addresses:
        return _ADDRESS, binding.addresses[name], offset
    return _POSITIONAL, [spec.name for spec in binding.positional].index(name), offset
