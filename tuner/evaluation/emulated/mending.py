"""Triton's interpreter, mended: what it computes wrongly, and what it lets pass that a GPU does not.

It keeps bf16 and 8-bit floats as unsigned integers and, as of 3.7, multiplies, adds and compares those integers
(``tl.dot`` included), rounds conversions by cutting or half up, and reads whatever address a kernel makes. Here such
operands are decoded to fp32 first, results rounded to nearest even, and every access must lie within one of the
kernel's own tensors. ``dot_scaled``, which it lacks or gets wrong, is computed for scales of powers of two (OCP
microscaling) and of e4m3 (nvfp4).

What stays outside: races between programs, which run one after the other; barriers and the warps of a specialised loop,
which are one thread here; sums in lower precision inside matrix units; the layout and width of accesses.

:func:`install` changes the process it is called in; only the emulation's worker does so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Bits = NDArray[Any]
Handle = Any
"""``TensorHandle``: numpy data, and its Triton type."""

_FP8 = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5": torch.float8_e5m2,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class UnsupportedError(Exception):
    """A kernel does what this emulation cannot vouch for."""


class MemoryFaultError(Exception):
    """A kernel touched memory that it was not given."""


@dataclass(frozen=True)
class Extent:
    """Memory that a kernel may touch: a tensor, or a part of the workspace."""

    name: str
    address: int
    nbytes: int
    writable: bool

    def holds(self, first: int, end: int) -> bool:
        """Whether bytes ``first`` up to ``end`` all lie in it."""
        return self.address <= first and end <= self.address + self.nbytes


class Memory:
    """The extents of the kernel that is running."""

    def __init__(self) -> None:
        self.extents: Sequence[Extent] = ()

    def require(self, addresses: Bits, mask: Bits, itemsize: int, *, write: bool) -> None:
        """Refuse an access outside one extent, not aligned to its element, or a write to an input.

        Raises:
            MemoryFaultError: which names the tensor and how far beyond it the access is.

        """
        # The interpreter gives results of comparisons the width of what was compared, and descriptors' masks as views.
        live = np.asarray(mask).astype(bool)
        active = addresses if live.all() else np.broadcast_to(addresses, live.shape)[live]
        if not active.size:
            return
        first, end = int(active.min()), int(active.max()) + itemsize
        extent = next((each for each in self.extents if each.holds(first, end)), None)
        what = "writes" if write else "reads"
        if extent is None:
            nearest = min(self.extents, key=lambda e: max(e.address - first, end - (e.address + e.nbytes), 0))
            where = f"bytes {first - nearest.address} to {end - nearest.address} of {nearest.name}"
            raise MemoryFaultError(f"{what} {where}, which has {nearest.nbytes}")
        if write and not extent.writable:
            raise MemoryFaultError(f"{what} the input {extent.name}")
        if int(np.bitwise_or.reduce(active.reshape(-1))) % itemsize:
            raise MemoryFaultError(f"{what} {extent.name} at an address that is no multiple of {itemsize}")


MEMORY = Memory()


def _is_narrow(dtype: tl.dtype) -> bool:
    """Whether the interpreter keeps numbers of this type as integers."""
    scalar = dtype.scalar
    return bool(scalar == tl.bfloat16 or (scalar.is_floating() and scalar.primitive_bitwidth == 8))


def decode(data: Bits, dtype: tl.dtype) -> Bits:
    """Numbers as numpy computes with them: fp32 for bf16 and 8-bit floats, unchanged for the rest."""
    scalar = dtype.scalar
    if not _is_narrow(scalar):
        return data
    if scalar == tl.bfloat16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if scalar.name not in _FP8:
        raise UnsupportedError(f"numbers of type {scalar.name}")
    flat = np.ascontiguousarray(data, np.uint8)
    return torch.from_numpy(flat).view(_FP8[scalar.name]).float().numpy()


def encode(values: Bits, dtype: tl.dtype) -> Bits:
    """Inverse of :func:`decode`, rounding to nearest even; 8-bit floats saturate, as conversions on GPUs do."""
    scalar = dtype.scalar
    if not _is_narrow(scalar):
        return values
    single = np.ascontiguousarray(values, np.float32)
    if scalar == tl.bfloat16:
        return torch.from_numpy(single).bfloat16().view(torch.uint16).numpy()
    if scalar.name not in _FP8:
        raise UnsupportedError(f"numbers of type {scalar.name}")
    kind = _FP8[scalar.name]
    largest = torch.finfo(kind).max
    return torch.from_numpy(single).clamp(-largest, largest).to(kind).view(torch.uint8).numpy()


def _handle(values: Bits, dtype: tl.dtype) -> Handle:
    return interpreter.TensorHandle(encode(values, dtype), dtype.scalar)


def _convert_float(data: Bits, source: tl.dtype, target: tl.dtype, rounding: Any) -> Bits:
    """Float to float, as bits of the target's width."""
    if rounding is not None and rounding != interpreter._ir.ROUNDING_MODE.RTNE:  # noqa: SLF001
        raise UnsupportedError("conversions that do not round to nearest even")
    values = decode(data, source)
    if _is_narrow(target):
        return encode(values, target)
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(values.astype(interpreter._get_np_dtype(target)))  # noqa: SLF001
    return converted.view(_UNSIGNED[converted.itemsize])


class _Mended(interpreter.InterpreterBuilder):  # type: ignore[misc]
    """Methods that replace those of the interpreter's builder."""

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        values = decode(src.data, src.dtype)
        if _is_narrow(dst_type):
            return _handle(values.astype(np.float32), dst_type)
        with np.errstate(over="ignore", invalid="ignore"):
            return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)  # noqa: SLF001

    def unary_op(self, arg: Handle, op: Callable[[Bits], Bits]) -> Handle:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return _handle(op(decode(arg.data, arg.dtype)), arg.dtype)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Callable[[Bits, Bits], Bits]) -> Handle:
        if _is_narrow(lhs.dtype) or _is_narrow(rhs.dtype):
            values = op(decode(lhs.data, lhs.dtype), decode(rhs.data, rhs.dtype))
            return interpreter.TensorHandle(values, tl.int1) if values.dtype == bool else _handle(values, lhs.dtype)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return _plain_binary_op(self, lhs, rhs, op)

    def ternary_op(self, lhs: Handle, rhs: Handle, other: Handle, op: Callable[[Bits, Bits, Bits], Bits]) -> Handle:
        if not _is_narrow(other.dtype):
            return _plain_ternary_op(self, lhs, rhs, other, op)
        return _handle(op(*(decode(each.data, each.dtype) for each in (lhs, rhs, other))), other.dtype)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        return _handle(decode(x.data, x.dtype) * decode(y.data, y.dtype) + decode(z.data, z.dtype), z.dtype)

    def create_rsqrt(self, arg: Handle) -> Handle:
        return self.unary_op(arg, lambda values: 1 / np.sqrt(values))

    def create_dot(self, a: Handle, b: Handle, d: Handle, _precision: Any, _imprecise: Any) -> Handle:
        kind = d.data.dtype
        product = np.matmul(decode(a.data, a.dtype).astype(kind), decode(b.data, b.dtype).astype(kind))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def create_dot_scaled(
        self,
        lhs: Handle,
        lhs_scale: Handle,
        lhs_format: Any,
        rhs: Handle,
        rhs_scale: Handle,
        rhs_format: Any,
        _fast_math: bool,
        lhs_k_pack: bool,
        rhs_k_pack: bool,
        acc: Handle,
    ) -> Handle:
        if not (lhs_k_pack and rhs_k_pack):
            raise UnsupportedError("dot_scaled of elements that are not packed along k")
        left = _scaled(lhs, lhs_scale, lhs_format)
        right = _scaled(_transposed(rhs), rhs_scale, rhs_format)
        return interpreter.TensorHandle(np.matmul(left, right.T).astype(np.float32) + acc.data, acc.dtype.scalar)

    def create_masked_load(
        self,
        ptrs: Handle,
        mask: Handle,
        other: Handle | None,
        cache_modifier: Any,
        eviction_policy: Any,
        is_volatile: Any,
    ) -> Handle:
        dtype = ptrs.get_element_ty()
        itemsize = interpreter._get_np_dtype(dtype).itemsize  # noqa: SLF001
        MEMORY.require(ptrs.data, mask.data, itemsize, write=False)
        if other is None and not mask.data.all():
            # On a GPU what is masked off is undefined, not zero.
            junk = (
                np.full(ptrs.data.shape, 0xFF, np.uint8)
                .repeat(itemsize, axis=-1)
                .view(
                    interpreter._get_np_dtype(dtype)  # noqa: SLF001
                )
            )
            other = interpreter.TensorHandle(junk.reshape(ptrs.data.shape), dtype)
        return _plain_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_descriptor_gather(self, desc: Handle, x_offsets: Handle, y_offset: Handle, _type: Any) -> Handle:
        """Rows of a two-dimensional descriptor: all at once, where the interpreter loads one after the other."""
        rows = x_offsets.data.astype(np.int64)[:, None]
        columns = int(y_offset.data.item()) + np.arange(desc.block_shape[-1])[None, :]
        (height, width), (step, _) = (tuple(int(each.data.item()) for each in of) for of in (desc.shape, desc.strides))
        itemsize = interpreter._get_np_dtype(desc.base.dtype.scalar.element_ty).itemsize  # noqa: SLF001
        addresses = desc.base.data + (itemsize * (rows * step + columns)).astype(np.uint64)
        pointers = interpreter.TensorHandle(addresses, desc.base.dtype.scalar)
        inside = interpreter.TensorHandle((rows >= 0) & (rows < height) & (columns < width), tl.int1)
        zeros = np.zeros(addresses.shape, interpreter._get_np_dtype(pointers.get_element_ty()))  # noqa: SLF001
        other = interpreter.TensorHandle(zeros, pointers.get_element_ty())
        return self.create_masked_load(pointers, inside, other, None, None, False)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Handle, cache: Any, eviction: Any) -> Any:
        MEMORY.require(ptrs.data, mask.data, value.data.itemsize, write=True)
        return _plain_masked_store(self, ptrs, value, mask, cache, eviction)

    def create_atomic_rmw(self, op: Any, ptr: Handle, val: Handle, mask: Handle, sem: Any, scope: Any) -> Handle:
        if _is_narrow(val.dtype):
            raise UnsupportedError(f"atomic operations on {val.dtype.scalar.name}")
        MEMORY.require(ptr.data, mask.data, val.data.itemsize, write=True)
        return _plain_atomic_rmw(self, op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr: Handle, cmp: Handle, val: Handle, sem: Any, scope: Any) -> Handle:
        MEMORY.require(ptr.data, np.ones(ptr.data.shape, bool), val.data.itemsize, write=True)
        return _plain_atomic_cas(self, ptr, cmp, val, sem, scope)


def _transposed(handle: Handle) -> Handle:
    return interpreter.TensorHandle(np.ascontiguousarray(handle.data.T), handle.dtype)


def _scaled(operand: Handle, scale: Handle | None, form: Any) -> Bits:
    """Numbers [rows, k] of one side of ``dot_scaled``, in fp64: a power of two for 32 of them, or an e4m3 for 16."""
    if form.name == "E2M1":
        data = operand.data
        values = _E2M1[np.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)]
    else:
        values = decode(operand.data, operand.dtype)
    wide: Bits = values.astype(np.float64)
    if scale is None:
        return wide
    if scale.dtype.scalar == tl.float8e4nv:
        group, factors = 16, decode(scale.data, scale.dtype).astype(np.float64)
    elif scale.data.dtype.itemsize == 1 and not scale.dtype.scalar.is_floating():
        group, factors = 32, np.ldexp(1.0, scale.data.view(np.uint8).astype(np.int32) - 127)
    else:
        raise UnsupportedError(f"dot_scaled with scales of type {scale.dtype.scalar.name}")
    if values.shape[1] != group * scale.data.shape[1]:
        raise UnsupportedError(f"dot_scaled with {values.shape[1] // scale.data.shape[1]} elements to a scale")
    wide *= factors.repeat(group, axis=1)
    return wide


def _checked_tensor(self: Any, operands: Any) -> None:
    for operand in operands:
        if isinstance(operand, tl.core.tensor) and _is_narrow(operand.dtype):
            raise UnsupportedError(f"reductions and scans of {operand.dtype.scalar.name}; convert to fp32 first")
    _plain_check_tensor(self, operands)


_plain_binary_op = interpreter.InterpreterBuilder.binary_op
_plain_ternary_op = interpreter.InterpreterBuilder.ternary_op
_plain_masked_load = interpreter.InterpreterBuilder.create_masked_load
_plain_masked_store = interpreter.InterpreterBuilder.create_masked_store
_plain_atomic_rmw = interpreter.InterpreterBuilder.create_atomic_rmw
_plain_atomic_cas = interpreter.InterpreterBuilder.create_atomic_cas
_plain_dot_scaled = TritonSemantic.dot_scaled
_plain_numpy_type = interpreter._get_np_dtype  # noqa: SLF001
_plain_patch_core = interpreter._patch_lang_core  # noqa: SLF001
_patched: set[str] = set()
_named: dict[str, np.dtype[Any]] = {}
_plain_check_tensor = interpreter.ReduceScanOpInterface.check_tensor


def _dot_scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Names of formats reach the interpreter as plain strings, where compiled code has constants."""
    constant = {at: tl.constexpr(value) for at, value in enumerate(args) if isinstance(value, str)}
    named = {name: tl.constexpr(value) if isinstance(value, str) else value for name, value in kwargs.items()}
    return _plain_dot_scaled(self, *(constant.get(at, value) for at, value in enumerate(args)), **named)


def _patch_core(lang: Any, scope: Any) -> None:
    """The interpreter converts to every 8-bit float but AMD's e4m3."""
    _plain_patch_core(lang, scope)
    plain = lang.dtype.to_ir

    def to_ir(self: tl.dtype, builder: Any) -> Any:
        return builder.get_fp8e4b8_ty() if self.name == "fp8e4b8" else plain(self, builder)

    scope.set_attr(lang.dtype, "to_ir", to_ir)


def _numpy_type(dtype: tl.dtype) -> np.dtype[Any]:
    """What numpy keeps a type in; pointers are addresses."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _named_type(scalar)


def _named_type(scalar: tl.dtype) -> np.dtype[Any]:
    if scalar.name not in _named:
        _named[scalar.name] = _plain_numpy_type(scalar)
    return _named[scalar.name]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls. The language is patched once for the module that it is from."""
    module = self.fn.__globals__["__name__"]
    if module not in _patched:
        _patched.add(module)
        interpreter._patch_lang(self.fn)  # noqa: SLF001
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def install() -> None:
    """Mend the interpreter of this process."""
    for name, method in vars(_Mended).items():
        if callable(method):
            setattr(interpreter.InterpreterBuilder, name, method)
    TritonSemantic.dot_scaled = _dot_scaled
    interpreter._convert_float = _convert_float  # noqa: SLF001
    interpreter._patch_lang_core = _patch_core  # noqa: SLF001
    interpreter.ReduceScanOpInterface.check_tensor = _checked_tensor
    # For speed alone: both are done anew, and slowly, for every call of a function and every operation.
    interpreter._get_np_dtype = _numpy_type  # noqa: SLF001
    interpreter.InterpretedFunction.__call__ = _call
