"""A binding as the plain tuples that the extension reads (runtime/native/description.h).

The extension is the twin of codegen/recipe/resolve.py: it gets all expressions compiled, and hands a call that it
cannot evaluate to the Python call, which says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import (
    SM_COUNT,
    THREADS,
    WORKSPACE,
    Argument,
    Guard,
    Launch,
    Recipe,
    TensorMap,
    TensorSpec,
    packable,
)
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import Binding, CallVariant, HostBinding, V
from tilewright.runtime.calls.device import DeviceBinding, DeviceCall, DeviceVariant
from tilewright.runtime.calls.exchange import CPU, CUDA, DTYPES
from tilewright.runtime.calls.pure import PureCall
from tilewright.runtime.launchers.cuda.kernel import CudaKernel, launch_attributes
from tilewright.runtime.launchers.cuda.tensor_maps import mends_small_maps

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
_DRIVER_FUNCTIONS = (
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuLaunchKernelEx",
    "cuTensorMapEncodeTiled",
    "cuMemsetD8Async",
)
"""In the order in which the extension takes them."""


def native_call(native: ModuleType, binding: HostBinding) -> Any:
    """``BoundCall`` of the extension for ``binding``.

    Raises:
        TilewrightError: when the binding has more tensors, dimensions, sizes, launches or arguments than the extension
            holds, or an expression that is nested too deeply.

    """
    try:
        return native.BoundCall(PureCall(binding), describe(binding))
    except (OverflowError, ValueError) as error:
        raise TilewrightError(f"{binding.name}: the compiled call layer cannot hold this kernel: {error}") from error


def native_device_call(native: ModuleType, binding: DeviceBinding) -> Any:
    """``CudaCall`` of the extension for ``binding``.

    The Python call where values are looked at, nothing can be launched, or the extension cannot hold the kernels.
    """
    twin = DeviceCall(binding)
    if not binding.launches or binding.checks_values:
        return twin
    driver, device = binding.launching
    place = (
        *(driver.addresses[name] for name in _DRIVER_FUNCTIONS),
        device.context,
        mends_small_maps(driver, device),
    )
    try:
        return native.CudaCall(twin, binding.workspaces.native, place, describe_device(binding))
    except (OverflowError, ValueError):
        return twin


def describe(binding: HostBinding) -> tuple[Any, ...]:
    """``binding`` as nested tuples of integers."""
    launches = [_host_launches(binding, variant) for variant in binding.variants]
    return _describe(binding, (THREADS, binding.threads), (CPU, 0), binding.most_workspace_bytes, launches)


def describe_device(binding: DeviceBinding) -> tuple[Any, ...]:
    """``binding``, which has a device, as nested tuples of integers."""
    _, device = binding.launching
    launches = [_device_launches(binding, variant) for variant in binding.variants]
    place, lies = (SM_COUNT, device.sm_count), (CUDA, binding.index)
    return _describe(binding, place, lies, _LARGEST, launches)


def _describe(
    binding: Binding[V],
    place: tuple[str, int],
    lies: tuple[int, int],
    most_workspace_bytes: int,
    launches: Sequence[tuple[Any, ...]],
) -> tuple[Any, ...]:
    """``place`` is the symbol that stands for it with its value, ``lies`` DLPack's name for it."""
    bound_tensors = [tensor for tensor in binding.bound.values() if isinstance(tensor, Tensor)]
    return (
        len(binding.symbols),
        binding.symbols.index(binding.size_name),
        binding.symbols.index(place[0]),
        binding.outputs,
        place[1],
        *lies,
        most_workspace_bytes,
        tuple(_tensor(binding, spec) for spec in binding.positional),
        tuple((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in bound_tensors),
        tuple(_variant(binding, *each) for each in zip(binding.variants, launches, strict=True)),
    )


def _tensor(binding: Binding[V], spec: TensorSpec) -> tuple[Any, ...]:
    dims = tuple(-1 - binding.symbols.index(dim) if isinstance(dim, str) else dim for dim in spec.dims)
    bound = binding.program(spec.bound) if spec.bound else ()
    lengths = [each.name for each in binding.positional].index(spec.lengths) if spec.lengths else -1
    checked = _VALUE_CHECKS[spec.values]
    return (*DTYPES[spec.dtype], spec.optional, checked, dims, bound, lengths, spec.page_size)


def _variant(binding: Binding[V], variant: V, launches: tuple[Any, ...]) -> tuple[Any, ...]:
    max_size = _LARGEST if variant.max_size is None else variant.max_size
    recipe = variant.recipe
    if recipe is None:
        return max_size, binding.program("0"), False, (), (), ()
    late = [guard for guard in recipe.guards if WORKSPACE in parsed(guard.expression).symbols]
    early = [guard for guard in recipe.guards if guard not in late]
    guards = [tuple(_guard(binding, variant, recipe, guard) for guard in some) for some in (early, late)]
    return max_size, binding.program(recipe.workspace_bytes), recipe.workspace_zeroed, launches, *guards


def _host_launches(binding: HostBinding, variant: CallVariant) -> tuple[Any, ...]:
    recipe = variant.recipe
    if recipe is None:
        return ()
    return tuple(
        (entry, tuple(_argument(binding, variant, recipe, argument) for argument in launch.arguments), None)
        for entry, launch in zip(variant.entries, recipe.launches, strict=True)
    )


def _device_launches(binding: DeviceBinding, variant: DeviceVariant) -> tuple[Any, ...]:
    recipe = variant.recipe
    if recipe is None:
        return ()
    return tuple(
        (
            kernel.function,
            tuple(_argument(binding, variant, recipe, argument) for argument in launch.arguments),
            _grid(binding, kernel, launch),
        )
        for kernel, launch in zip(variant.kernels, recipe.launches, strict=True)
    )


def _grid(binding: DeviceBinding, kernel: CudaKernel, launch: Launch) -> tuple[Any, ...]:
    """What is the same in every launch of an entry, and the code of its grid and block."""
    texts = [(*some, "1", "1")[:3] for some in (launch.grid, launch.block)]
    names = binding.place.names  # clusters and shared memory are the same in all calls
    blocks = [parsed(text).evaluate(names) for text in (*launch.cluster, "1", "1")[:3]]
    cluster = (blocks[0], blocks[1], blocks[2]) if launch.cluster else None
    attributes = launch_attributes(cluster, programmatic=launch.programmatic, cooperative=launch.cooperative)
    return (
        tuple(binding.program(text) for some in texts for text in some),
        parsed(launch.shared_memory_bytes).evaluate(names),
        launch.hidden_arguments,
        tuple((which, *(*values, 0, 0)[:3]) for which, values in attributes),
        kernel.parameter_bytes,
    )


def _guard(binding: Binding[V], variant: V, recipe: Recipe, guard: Guard) -> tuple[tuple[int, ...], int]:
    """Its code: after the sizes come the addresses of the call's tensors in order, and of the workspace."""
    symbols = (*binding.symbols, *(spec.name for spec in binding.positional), WORKSPACE)
    passed_once = {
        tensor.name: binding.addresses[name]
        for tensor in recipe.tensors
        if (name := variant.aliases.get(tensor.name, tensor.name)) in binding.addresses
    }
    return parsed(guard.expression).program(symbols, passed_once), guard.multiple


def _argument(binding: Binding[V], variant: V, recipe: Recipe, argument: Argument) -> tuple[Any, ...]:
    """Where an argument begins, with the code of its offset in bytes (none: 0); of a size, the code of its value.

    Then its tensor map, or None.
    """
    return *_value(binding, variant, recipe, argument), _map(binding, argument.map)


def _map(binding: Binding[V], wanted: TensorMap | None) -> tuple[Any, ...] | None:
    if wanted is None:
        return None
    shape = tuple(binding.program(text) for text in wanted.shape)
    return shape, wanted.box, wanted.element_bytes, wanted.data_type, wanted.swizzle, wanted.l2_promotion


def _value(binding: Binding[V], variant: V, recipe: Recipe, argument: Argument) -> tuple[int, int, tuple[int, ...]]:
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
