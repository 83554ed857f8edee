"""Weights into the panels of a :class:`WeightLayout`, on numpy arrays. Needs no torch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.extension import native_module
from tilewright.runtime.weights.quantising import quantisable, quantise

MAX_COLUMNS = 1024
"""Widest panel that is packed."""

_ELEMENTS = ("fp32", "bf16", "int8", "fp8_e4m3", "int4", "fp4_e2m1")
"""In the order of ``tw_element`` (runtime/native/quantise.h)."""


def packed_dtype(layout: WeightLayout) -> type[np.float32] | type[np.int32]:
    """Element type of a packed weight: floats, or words of 32 bits in a precision that quantises."""
    return np.int32 if layout.stored.quantised else np.float32


def packed_shape(layout: WeightLayout, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """[experts, panels, rows, columns] of packed weights that are [experts, n, k] as declared.

    Raises:
        TilewrightError: when the layout is impossible, or does not fit these weights.

    """
    experts, n, k = shape
    run = _run(layout)
    if refusal := layout.stored.refusal(k):
        raise TilewrightError(f"cannot pack weights as {layout.key}: {refusal}")
    if (
        not 1 <= layout.columns <= MAX_COLUMNS
        or run < 1
        or (layout.columns != run and layout.columns % (layout.halves * run))
    ):
        raise TilewrightError(
            f"cannot pack weights as {layout.key}: columns must be one run, or whole runs of every half, "
            f"{MAX_COLUMNS} at most"
        )
    if n % layout.halves:
        raise TilewrightError(f"cannot pack weights as {layout.key}: {n} rows do not split into {layout.halves} halves")
    return experts, layout.panels(n), layout.stored.rows(k), layout.columns


def pack_array(weight: NDArray[Any], layout: WeightLayout, out: NDArray[Any], threads: int) -> None:
    """Pack ``weight`` into ``out``, which should be aligned to 64 bytes.

    Args:
        weight: float32 [experts, n, k], of any strides. Packing is fast where the last dimension is contiguous.
        layout: panels to make.
        out: contiguous, of :func:`packed_shape` and :func:`packed_dtype`; it must not overlap ``weight``.
        threads: threads to pack on, 1 or more.

    Raises:
        TilewrightError: when the arrays are not these, and for weights that are to be quantised and are not finite or
            2^126 and larger.

    """
    if weight.dtype != np.float32 or weight.ndim != 3:
        raise TilewrightError(
            f"cannot pack weights of dtype {weight.dtype} and shape {list(weight.shape)}; "
            "expected float32 [experts, n, k]"
        )
    shape = packed_shape(layout, weight.shape)
    dtype = packed_dtype(layout)
    if out.dtype != dtype or out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise TilewrightError(
            f"cannot pack weights into {out.dtype} of shape {list(out.shape)}; "
            f"expected contiguous writable {np.dtype(dtype)} {list(shape)}"
        )
    native = native_module()
    contiguous_rows = weight.strides[2] == weight.itemsize
    if weight.size == 0:
        out[...] = 0
    elif native is not None and contiguous_rows:
        _pack_native(native, weight, layout, out, threads)
    else:
        for expert in range(shape[0]):
            if native is None:
                _pack_expert(weight[expert], layout, out[expert])
            else:
                one = np.ascontiguousarray(weight[expert])[None]
                _pack_native(native, one, layout, out[expert : expert + 1], threads)


def _run(layout: WeightLayout) -> int:
    """Columns of one half that lie together."""
    return layout.run or layout.columns


def _not_quantisable(layout: WeightLayout) -> TilewrightError:
    return TilewrightError(
        f"cannot pack weights as {layout.key}: they hold NaN, infinity or values beyond 2^126, which have no scale; "
        "mend the weights, or pack them as fp32"
    )


def _pack_native(
    native: ModuleType, weight: NDArray[Any], layout: WeightLayout, out: NDArray[Any], threads: int
) -> None:
    experts, n, k = weight.shape
    expert_stride, row_stride = (stride // weight.itemsize for stride in weight.strides[:2])
    stored = layout.stored
    packed = native.pack(
        weight.__array_interface__["data"][0],
        expert_stride,
        row_stride,
        experts,
        n,
        k,
        layout.columns,
        layout.halves,
        _run(layout),
        _ELEMENTS.index(stored.dtype),
        stored.group(k),
        stored.scales.per_word if stored.scales else 0,
        out.__array_interface__["data"][0],
        threads,
    )
    if not packed:
        raise _not_quantisable(layout)


def _pack_expert(weight: NDArray[Any], layout: WeightLayout, out: NDArray[Any]) -> None:
    """``weight`` [n, k] into ``out`` [panels, rows, columns]."""
    if layout.stored.quantised:
        if not quantisable(weight):
            raise _not_quantisable(layout)
        weight = quantise(weight, layout.stored).view(np.int32)
    n, depth = weight.shape
    panels, run, half_rows = out.shape[0], _run(layout), n // layout.halves
    runs_per_half = panels * layout.columns // (run * layout.halves)
    in_turn = np.zeros((runs_per_half, layout.halves, run, depth), weight.dtype)
    for half in range(layout.halves):
        padded = np.zeros((runs_per_half * run, depth), weight.dtype)
        padded[:half_rows] = weight[half * half_rows : (half + 1) * half_rows]
        in_turn[:, half] = padded.reshape(runs_per_half, run, depth)
    out[...] = in_turn.reshape(panels, layout.columns, depth).transpose(0, 2, 1)
