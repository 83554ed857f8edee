"""The compiled half of the runtime, where it was built and is wanted. Needs torch only for its tensors."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tilewright.runtime.launchers.openmp import pool

if TYPE_CHECKING:
    import torch

_TENSOR_BYTES = 192
"""What torch's own tensor takes at the least, since 1.13; its keys are in it."""


@cache
def native_module() -> ModuleType | None:
    """``tilewright.runtime._native``; None where there was no compiler to build it, or with ``TILEWRIGHT_NATIVE=0``."""
    if os.environ.get("TILEWRIGHT_NATIVE") == "0":
        return None
    try:
        module = importlib.import_module("tilewright.runtime._native")
    except ImportError:
        return None
    module.set_pool(*pool())
    return module


@cache
def native_for_torch() -> ModuleType | None:
    """The extension, ready to read torch tensors; None where torch lacks the DLPack exchange API (before 2.10), too."""
    import torch

    native = native_module()
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if native is None or exchange is None:
        return None
    native.setup_torch(torch.Tensor, torch.nn.Parameter, exchange, torch.is_grad_enabled)
    if (found := find_keys()) is not None:
        native.set_tensor_keys(*found)
    return native


@cache
def native_for_device(index: int) -> ModuleType | None:
    """The extension, ready to read torch tensors on a CUDA device as well."""
    import torch

    native = native_for_torch()
    if native is not None and torch.cuda.is_available():
        native.set_tensor_keys(*(find_keys(torch.device("cuda", index)) or (0, 0, 0)))
    return native


def know_type(kind: type) -> None:
    """Have the extension read arrays of a library other than torch, where that offers the DLPack exchange in C."""
    native, exchange = native_for_torch(), getattr(kind, "__dlpack_c_exchange_api__", None)
    if native is not None and exchange is not None and kind not in _asked_for:
        _asked_for.add(kind)
        # Where there is no room for one more, or no table of version 1, the Python call reads them.
        with suppress(ImportError):
            native.add_tensor_type(kind, exchange, False)


def find_keys(device: torch.device | None = None) -> tuple[int, int, int] | None:
    """Where torch keeps the dispatch keys of a tensor, and those of plain ones on the CPU and on ``device``.

    That is no part of torch's interface, so it is looked for among tensors whose keys torch tells, and None where they
    are not found at one place in all of them. Nothing beyond the objects themselves is read.

    Returns:
        Offset in the object of the address of what it holds, offset of the keys there, the keys as bits.

    """
    import torch

    plain = torch.zeros(2, dtype=torch.float32, device="cpu")
    integers = torch.zeros((2, 3), dtype=torch.int32, device="cpu")
    with torch.inference_mode():
        inference = torch.zeros(1, dtype=torch.float32, device="cpu")
    there = torch.zeros(1, dtype=torch.float32, device=device or "cpu")
    negative = torch._neg_view(plain)  # noqa: SLF001 - torch makes them elsewhere, too
    others = (negative, plain.to(torch.complex64).conj(), plain.to("meta"))
    try:
        keys_of: Any = torch._C._dispatch_keys  # noqa: SLF001 - guarded: where it is gone, tensors are asked
        keys = {each: int(keys_of(each).raw_repr()) for each in (plain, integers, inference, there, *others)}
        held = {each: int(each._cdata) for each in keys}  # noqa: SLF001 - likewise
    except (AttributeError, RuntimeError, TypeError):
        return None

    def places(begin: Mapping[Any, int], values: Mapping[Any, int], end: int) -> list[int]:
        return [
            offset
            for offset in range(0, end, 8)
            if all(ctypes.c_uint64.from_address(begin[each] + offset).value == values[each] for each in values)
        ]

    in_object = places({each: id(each) for each in keys}, held, torch.Tensor.__basicsize__)
    in_tensor = places(held, keys, _TENSOR_BYTES)
    allowed = keys[plain] | keys[integers] | keys[inference] | keys[there]
    if len(in_object) != 1 or len(in_tensor) != 1 or any(keys[each] & ~allowed == 0 for each in others):
        return None
    return in_object[0], in_tensor[0], allowed


_asked_for: set[type] = set()
