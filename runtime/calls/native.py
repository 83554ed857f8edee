"""A binding as the plain tuples that the extension reads (runtime/native/description.h)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from tilewright.codegen.recipe.model import Argument, TensorSpec
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import THREADS, Binding, CallVariant
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
        ValueError: when the binding has more tensors, dimensions or sizes than the extension holds.

    """
    return native.BoundCall(PureCall(binding), describe(binding))


def describe(binding: Binding) -> tuple[Any, ...]:
    """``binding`` as nested tuples of integers."""
    bound_tensors = [tensor for tensor in binding.bound.values() if isinstance(tensor, Tensor)]
    return (
        len(binding.symbols),
        binding.symbols.index(binding.size_name),
        binding.symbols.index(THREADS),
        binding.outputs,
        binding.threads,
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
    return (
        _LARGEST if variant.max_size is None else variant.max_size,
        binding.program(variant.workspace_bytes),
        variant.workspace_zeroed,
        tuple((entry, tuple(_argument(binding, a) for a in arguments)) for entry, arguments in variant.launches),
        tuple((binding.program(guard.expression), guard.multiple) for guard in variant.guards),
    )


def _argument(binding: Binding, argument: Argument) -> tuple[int, int, tuple[int, ...]]:
    match argument.kind:
        case "workspace":
            return _WORKSPACE, 0, ()
        case "size":
            return _SIZE, 0, binding.program(argument.source)
        case "tensor":
            if argument.source in binding.addresses:
                return _ADDRESS, binding.addresses[argument.source], ()
            positions = [spec.name for spec in binding.positional]
            return _POSITIONAL, positions.index(argument.source), ()
        case "scales":
            raise TilewrightError("a kernel that takes scales by themselves is for GPUs; tune for this CPU")
