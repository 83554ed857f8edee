"""The call layer: bind kernels to weights once, then call them with next to no overhead.

The compiled extension does what it can; everything else, and every message, comes from the pure-Python twin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import Binding, CallVariant, HostBinding, in_order
from tilewright.runtime.calls.device import DeviceBinding, DeviceCall, DeviceVariant
from tilewright.runtime.calls.extension import native_for_device, native_for_torch
from tilewright.runtime.calls.native import native_call, native_device_call
from tilewright.runtime.calls.pure import PureCall
from tilewright.runtime.calls.workspaces import WORKSPACES, Workspaces
from tilewright.runtime.launchers.cuda.driver import CudaDevice, Driver
from tilewright.runtime.serve.routing import softmax_topk, softmax_topk_into, sort_tokens, sort_tokens_into
from tilewright.runtime.torch.readable import require_plain, resolved
from tilewright.runtime.weights.packing import pack_array, packed_dtype, packed_shape

__all__ = [
    "IMPLEMENTATION",
    "BoundCall",
    "CallVariant",
    "DeviceVariant",
    "bind_call",
    "bind_device_call",
    "pack_weight",
    "softmax_topk",
    "softmax_topk_into",
    "sort_tokens",
    "sort_tokens_into",
]

_NATIVE = native_for_torch()

IMPLEMENTATION: Literal["native", "pure"] = "pure" if _NATIVE is None else "native"
"""What serves calls in this process."""


class BoundCall(Protocol):
    """A call bound to its weights and kernels; thread-safe."""

    @property
    def binding(self) -> Binding[Any]:
        """What it was made of."""
        ...

    def workspace_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of workspace that a call of these sizes takes; 0 where the fallback serves it."""
        ...

    def __call__(self, *tensors: Any) -> Any:
        """Compute from the tensors that were not bound, in order, into the output among them, and return that.

        Raises:
            TilewrightError: for tensors or values that do not fit, overlapping memory, and a failing kernel.

        """
        ...


def bind_call(
    tensors: Sequence[TensorSpec],
    bound: Mapping[str, Tensor | int | None],
    variants: Sequence[CallVariant],
    *,
    size_name: str,
    threads: int | None = None,
    fallback: Callable[..., None],
    name: str,
) -> BoundCall:
    """Bind ``variants`` to what stays the same from call to call.

    Args:
        tensors: all tensors, in order.
        bound: the tensors that are passed now, by name: contiguous CPU tensors (kept alive, and not looked at again),
            addresses, or None for an absent optional one. A weight may be packed: its shape is the kernels' business.
        variants: what serves which sizes. Sizes that none of them serves go to the fallback, with one warning.
        size_name: the size that picks a variant.
        threads: most threads of a call; None: ``torch.get_num_threads()``.
        fallback: called with the tensors of a call, after they were checked, where no kernel may run: a variant without
            launches, tensors that are not contiguous or aligned, a failed guard. It must write the output.
        name: op and stage, which begin every message.

    Raises:
        TilewrightError: when the parts do not fit together.

    """
    binding = HostBinding(
        name=name,
        tensors=tuple(tensors),
        bound=dict(bound),
        variants=in_order(variants),
        size_name=size_name,
        threads=torch.get_num_threads() if threads is None else threads,
        fallback=fallback,
    )
    call: BoundCall = PureCall(binding) if _NATIVE is None else native_call(_NATIVE, binding)
    return call


def bind_device_call(
    tensors: Sequence[TensorSpec],
    bound: Mapping[str, Tensor | int | None],
    variants: Sequence[DeviceVariant],
    *,
    size_name: str,
    device: CudaDevice | None,
    driver: Driver | None,
    fallback: Callable[..., None],
    name: str,
    checks_values: bool = False,
    workspace: Callable[[int], object] | None = None,
    torch_device: torch.device | None = None,
) -> BoundCall:
    """Bind ``variants`` to what stays the same from call to call, on a device.

    A call is enqueued on the stream on which the library of its tensors works in the calling thread, and returns at
    once. A CUDA graph may record it once a call of that size was made on that stream. Tensors are torch's, cupy's, or
    of another library that tells its stream by the DLPack exchange.

    Args:
        tensors: all tensors, in order.
        bound: as :func:`bind_call` takes them, on the device.
        variants: what serves which sizes, their kernels loaded on the device.
        size_name: the size that picks a variant.
        device: that calls are made on; None, with no driver, where nothing can be launched: the fallback serves then.
        driver: that launches.
        fallback: as of :func:`bind_call`.
        name: op and stage, which begin every message.
        checks_values: whether the values of tensors are checked as on the CPU. A call then waits for the device.
        workspace: gives memory on the device (a tensor, or what speaks DLPack) of at least as many bytes as it is
            asked for, once for each stream and when more is needed; it is kept for good. None: torch.empty, or what
            the library of the tensors has in its place. What a call needs, its ``workspace_bytes`` says.
        torch_device: the device where ``device`` is None; None: that of the bound tensors.

    Raises:
        TilewrightError: when the parts do not fit together.

    """
    binding = DeviceBinding(
        name=name,
        tensors=tuple(tensors),
        bound=dict(bound),
        variants=in_order(variants),
        size_name=size_name,
        fallback=fallback,
        index=_index_of(name, device, torch_device, bound),
        device=device,
        driver=driver,
        checks_values=checks_values,
        workspaces=WORKSPACES if workspace is None else Workspaces(),
        allocate=workspace,
    )
    native = None if _NATIVE is None else native_for_device(binding.index)
    call: BoundCall = DeviceCall(binding) if native is None else native_device_call(native, binding)
    return call


def _index_of(
    name: str, device: CudaDevice | None, torch_device: torch.device | None, bound: Mapping[str, Tensor | int | None]
) -> int:
    """Of the device of a binding, as torch counts."""
    if device:
        return device.index
    devices = [torch_device, *(each.device for each in bound.values() if isinstance(each, Tensor))]
    found = next((each for each in devices if each is not None), None)
    if found is None or found.type != "cuda":
        raise TilewrightError(f"{name}: nothing says which device it is bound for; pass torch_device")
    return found.index or 0


def pack_weight(
    weight: Tensor, layout: WeightLayout, out: Tensor | None = None, *, threads: int | None = None
) -> Tensor:
    """Pack ``weight`` in panels, quantised where the layout's precision says so.

    Args:
        weight: fp32 [experts, n, k], of any strides; fast where the last dimension is contiguous.
        layout: panels to make.
        out: contiguous [experts, panels, rows, columns] to write, fp32, or int32 words in a precision that quantises;
            made, aligned to 64 bytes, when None.
        threads: threads to pack on; None: ``torch.get_num_threads()``.

    Raises:
        TilewrightError: when the weight is another kind of tensor, the layout does not fit it, or it is to be quantised
            and holds NaN or infinity.

    """
    require_plain(weight, "the weight to pack")
    if weight.device.type != "cpu" or weight.dtype is not torch.float32 or weight.dim() != 3:
        raise TilewrightError(
            f"cannot pack a weight of {weight.dtype} {list(weight.shape)} on {weight.device}; "
            "expected torch.float32 [experts, n, k] on the CPU"
        )
    if out is None:
        experts, n, k = weight.shape
        dtype = torch.from_numpy(np.empty(0, packed_dtype(layout))).dtype
        out = torch.empty(packed_shape(layout, (experts, n, k)), dtype=dtype, device="cpu")
    threads = torch.get_num_threads() if threads is None else threads
    pack_array(resolved(weight.detach()).numpy(), layout, out.detach().numpy(), threads)
    return out
