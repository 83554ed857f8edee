"""Weights into the panels of a :class:`WeightLayout`, on numpy arrays. Needs no torch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.layouts import WeightLayout
from tilewright.errors import TilewrightError
from tilewright.runtime.native_module import native_module

MAX_COLUMNS = 1024
"""Widest panel that is packed."""


def packed_shape(layout: WeightLayout, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """[experts, panels, k, columns] of packed weights that are [experts, n, k] as declared.

    Raises:
        TilewrightError: when the layout is impossible, or does not fit these weights.

    """
    experts, n, k = shape
    run = _run(layout)
    if layout.dtype != "fp32" or layout.scales is not None:
        raise TilewrightError(f"cannot pack weights as {layout.key}: only fp32 without scales is supported")
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
    return experts, layout.panels(n), k, layout.columns


def pack_array(weight: NDArray[Any], layout: WeightLayout, out: NDArray[Any], threads: int) -> None:
    """Pack ``weight`` into ``out``, which should be aligned to 64 bytes.

    Args:
        weight: float32 [experts, n, k], of any strides. Packing is fast where the last dimension is contiguous.
        layout: panels to make.
        out: contiguous float32, of :func:`packed_shape`; it must not overlap ``weight``.
        threads: threads to pack on, 1 or more.

    Raises:
        TilewrightError: when the arrays are not these.

    """
    if weight.dtype != np.float32 or weight.ndim != 3:
        raise TilewrightError(
            f"cannot pack weights of dtype {weight.dtype} and shape {list(weight.shape)}; "
            "expected float32 [experts, n, k]"
        )
    shape = packed_shape(layout, weight.shape)
    if out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise TilewrightError(
            f"cannot pack weights into {out.dtype} of shape {list(out.shape)}; "
            f"expected contiguous writable float32 {list(shape)}"
        )
    native = native_module()
    if native is None:
        for expert in range(shape[0]):
            _pack_expert(weight[expert], layout, out[expert])
    elif weight.size == 0:
        out[...] = 0
    elif weight.strides[2] == weight.itemsize:
        _pack_native(native, weight, layout, out, threads)
    else:
        for expert in range(shape[0]):
            _pack_native(native, np.ascontiguousarray(weight[expert])[None], layout, out[expert : expert + 1], threads)


def _run(layout: WeightLayout) -> int:
    """Columns of one half that lie together."""
    return layout.run or layout.columns


def _pack_native(
    native: ModuleType, weight: NDArray[Any], layout: WeightLayout, out: NDArray[Any], threads: int
) -> None:
    experts, n, k = weight.shape
    expert_stride, row_stride = (stride // weight.itemsize for stride in weight.strides[:2])
    native.pack(
        weight.__array_interface__["data"][0],
        expert_stride,
        row_stride,
        experts,
        n,
        k,
        layout.columns,
        layout.halves,
        _run(layout),
        out.__array_interface__["data"][0],
        threads,
    )


def _pack_expert(weight: NDArray[Any], layout: WeightLayout, out: NDArray[Any]) -> None:
    """``weight`` [n, k] into ``out`` [panels, k, columns]."""
    n, k = weight.shape
    panels, run, half_rows = out.shape[0], _run(layout), n // layout.halves
    runs_per_half = panels * layout.columns // (run * layout.halves)
    in_turn = np.zeros((runs_per_half, layout.halves, run, k), np.float32)
    for half in range(layout.halves):
        padded = np.zeros((runs_per_half * run, k), np.float32)
        padded[:half_rows] = weight[half * half_rows : (half + 1) * half_rows]
        in_turn[:, half] = padded.reshape(runs_per_half, run, k)
    out[...] = in_turn.reshape(panels, layout.columns, k).transpose(0, 2, 1)
