"""Torch tensors in this process's memory that say they lie on a CUDA device, for machines without one.

Their ``device``, ``is_cuda``, ``__dlpack_device__`` and torch's DLPack exchange table say ``cuda:N``, and
``data_ptr()`` is where their values really are. Torch computes on them as on the CPU; a driver whose device memory is
this process's (the stand-in) can launch on them. This shows how calls are made, and nothing of what a device computes.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tilewright.runtime.calls.exchange import ExchangeTable, exchange_table
from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.torch import readable

_storages: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
"""Tensors that pose, by an arbitrary key: whoever launches may touch their storages while they live."""


class Posed(Tensor):
    """A tensor that says it lies on ``cuda:index``, while ``held`` has its values on the CPU."""

    held: Tensor
    index: int

    @staticmethod
    def __new__(cls, held: Tensor, index: int = 0) -> Self:
        posed = Tensor._make_subclass(
            cls, held, held.requires_grad, dispatch_device=True, device_for_backend_keys=torch.device("cuda", index)
        )
        posed.held, posed.index = held, index
        _storages[id(posed)] = posed
        return posed

    @classmethod
    def __torch_dispatch__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        return _compute(function, args, kwargs or {})

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        if function is Tensor.__setitem__:  # it would make a tensor of the value on the device
            return function(*tree_map(values, args))
        if function is Tensor.__getitem__:
            return pose(function(*tree_map(values, args)), args[0].index)
        # Results pose already where they should, and are not made to once more.
        with torch._C.DisableTorchFunctionSubclass():
            return _GUARDED.get(function, function)(*args, **kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Posed({self.held!r}, index={self.index})"


_cloned = torch.ops.aten.clone.default
_copied_back = torch.ops.aten._to_copy.default
_read_scalar = torch.ops.aten._local_scalar_dense.default
_GUARDED: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.copy_: torch.ops.aten.copy_.default,
    Tensor.nonzero: torch.ops.aten.nonzero.default,
    Tensor.__invert__: torch.ops.aten.bitwise_not.default,
    Tensor.contiguous: lambda tensor, **_: (
        tensor
        if tensor.is_contiguous()
        else torch.ops.aten.clone.default(tensor, memory_format=torch.contiguous_format)
    ),
    Tensor.__int__: lambda tensor: int(_read_scalar(tensor)),
    Tensor.__index__: lambda tensor: int(_read_scalar(tensor)),
    Tensor.__float__: lambda tensor: float(_read_scalar(tensor)),
    Tensor.tolist: lambda tensor: _copied_back(tensor, device=torch.device("cpu")).tolist(),
}
"""For what torch writes by hand: it makes the device current, which a torch without CUDA cannot."""


def pose(tensor: Tensor, index: int = 0) -> Posed:
    """``tensor`` of the CPU, whose memory the result shares, as one of ``cuda:index``."""
    return tensor if isinstance(tensor, Posed) else Posed(tensor.detach(), index)


def values(tensor: Tensor) -> Tensor:
    """The same tensor without the pose, sharing its memory."""
    return tensor.held if isinstance(tensor, Posed) else tensor


def extents() -> list[tuple[int, int]]:
    """Address and bytes of every storage that a living posed tensor has, each once."""
    storages = [posed.held.untyped_storage() for posed in list(_storages.values())]
    return sorted({(each.data_ptr(), each.nbytes()) for each in storages if each.nbytes()})


@contextmanager
def posing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it torch makes tensors on ``cuda:N``, and moves them there and back: they are posed ones.

    Calls of the runtime take them as torch's own.
    """
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    let_calls_take_them(monkeypatch)
    with _Factories(), _Moves():
        yield


def let_calls_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls of the runtime take posed tensors as torch's own, though their class computes by itself."""
    monkeypatch.setattr(readable, "_OWN_KINDS", (Tensor, torch.nn.Parameter, Posed))
    if (native := native_for_torch()) is not None:
        native.add_tensor_type(Posed, Posed.__dlpack_c_exchange_api__, True)


@contextmanager
def on_stream(handle: int) -> Iterator[None]:
    """Within it the stream with this handle is the one on which this thread works with posed tensors; else 0 is."""
    before, _thread.stream = getattr(_thread, "stream", 0), handle
    try:
        yield
    finally:
        _thread.stream = before


def _compute(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``function`` on the CPU; what it gives is posed on the device that it was asked for, or that of its tensors."""
    if function is torch.ops.prim.device.default:
        return torch.device("cuda", args[0].index)
    flat = [each for each in _leaves((args, kwargs)) if isinstance(each, Posed)]
    index = flat[0].index if flat else None
    if kwargs.get("device") is not None:
        index = _index(torch.device(kwargs["device"]))
        kwargs = {**kwargs, "device": torch.device("cpu")} if index is not None else kwargs
    made = function(*tree_map(values, args), **tree_map(values, kwargs))
    # What is written in place is returned as it was passed: its identity matters to callers.
    passed = {id(each.held): each for each in flat}
    if index is None:
        # A copy from the device shares no memory with it.
        return tree_map(lambda each: each.clone() if id(each) in passed else each, made) if flat else made

    def posed(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return passed[id(each)] if id(each) in passed else pose(each, index)

    return tree_map(posed, made)


def _index(device: torch.device) -> int | None:
    """Of a CUDA device; None of the CPU."""
    return (device.index or 0) if device.type == "cuda" else None


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    tree_map(found.append, tree)
    return found


class _Factories(TorchDispatchMode):
    """Makes what is asked for on a CUDA device."""

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        return _compute(function, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """Moves tensors to devices: a torch without CUDA refuses that before it would dispatch."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if function is torch.tensor and "device" in kwargs:
            device = torch.device(kwargs["device"] or "cpu")
            return _moved(function(*args, **{**kwargs, "device": torch.device("cpu")}), device)
        if function is Tensor.cuda:
            return _moved(args[0], torch.device("cuda", int(args[1]) if len(args) > 1 else 0))
        if function is Tensor.cpu:
            return _moved(args[0], torch.device("cpu"))
        if function is Tensor.to:
            passed = (*args[1:], *kwargs.values())
            named = [torch.device(each) for each in passed if _is_device(each)]
            dtypes = [each for each in passed if isinstance(each, torch.dtype)]
            if named:
                return _moved(args[0].to(dtypes[0]) if dtypes else args[0], named[0])
        return function(*args, **kwargs)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"))


def _moved(tensor: Tensor, to: torch.device) -> Tensor:
    if tensor.device == to or (to.type == "cuda" and to.index is None and tensor.device.type == "cuda"):
        return tensor
    copied = values(tensor.detach()).clone()
    moved = copied if to.type == "cpu" else pose(copied, to.index or 0)
    return torch.nn.Parameter(moved, requires_grad=tensor.requires_grad) if _is_parameter(tensor) else moved


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
def _current_stream(device_type: int, device_id: int, out: Any) -> int:
    del device_type, device_id
    out[0] = getattr(_thread, "stream", 0) or None
    return 0


def _posed_exchange() -> object:
    """That of torch's own tensors, but for the stream: a torch without CUDA throws where it is asked for one."""
    given = exchange_table(Tensor)
    assert given is not None
    table = ExchangeTable.from_buffer_copy(given)
    table.current_work_stream = ctypes.cast(_current_stream, ctypes.c_void_p).value
    _kept.append(table)
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(("PyCapsule_New", ctypes.pythonapi))(ctypes.addressof(table), _CAPSULE, None)


_CAPSULE = b"dlpack_exchange_api"
_kept: list[object] = []
_thread = threading.local()
if exchange_table(Tensor) is not None:
    Posed.__dlpack_c_exchange_api__ = _posed_exchange()
