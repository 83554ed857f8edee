"""moe_gemm on GPUs: what each launch of its Triton templates has to do, for predictions."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.numbers.dtypes import ITEMSIZE
from tilewright.codegen.numbers.precisions import Precision
from tilewright.codegen.ops.moe_gemm.problem import MoeGemmProblem
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.tiled_work import WeightFormat, grouped_gemm_work
from tilewright.codegen.work import LaunchWork

_SEED = 0
"""Of the routing: predictions and emulated checks see the same."""

_UNPACK_OPS = {"int8": 2.0, "fp8_e4m3": 2.0, "int4": 4.0, "fp4_e2m1": 4.0}
"""Instructions of a thread for an element that the matrix unit does not take: shift, mask, convert, scale. Estimated
from the macros in templates/shared/triton_elements.jinja, not fitted."""


@lru_cache(maxsize=256)
def rows_of_experts(problem: MoeGemmProblem) -> NDArray[np.int64]:
    """Rows that fall on each expert, as the problem's routing draws them."""
    offsets = problem.order(_SEED)[1].expert_offsets.astype(np.int64)
    return offsets[1:] - offsets[:-1]


def weight_format(signature: MoeGemmSignature, precision: Precision) -> WeightFormat:
    """Bytes of an element with its share of the scales, and what unpacking costs."""
    scales = precision.scales
    scale_bytes = 0.0
    if scales is not None and scales.granularity in ("group", "block"):
        scale_bytes = scales.itemsize / (scales.group * (scales.group if scales.granularity == "block" else 1))
    native = bool(precision.x_dtype) or precision.dtype == signature.x_dtype
    return WeightFormat(precision.bits / 8 + scale_bytes, 0.0 if native else _UNPACK_OPS[precision.dtype])


def gemm_work(
    problem: MoeGemmProblem,
    precision: Precision,
    tile: tuple[int, int, int],
    *,
    weights_first: bool,
    out_bytes: float,
    split_k: int = 1,
) -> LaunchWork:
    """The grouped product; ``tile`` is rows, output columns and steps of k."""
    signature = problem.signature
    work = grouped_gemm_work(
        "moe_gemm",
        rows_of_experts(problem),
        signature.n,
        signature.k,
        tile=tile,
        dtype=precision.mma_dtype(signature.x_dtype),
        weights=weight_format(signature, precision),
        halves=signature.halves,
        split_k=split_k,
        x_rows=problem.tokens if signature.stage == "up" else None,
        out_bytes=out_bytes,
    )
    return replace(work, tile=work.tile[::-1]) if weights_first else work


def combine_work(problem: MoeGemmProblem, partial_bytes: float, columns: int, splits: int) -> LaunchWork:
    """Partial results added up, ``columns`` of them by one program: of a token's experts, or of the parts of k."""
    signature = problem.signature
    rows, out_bytes = float(rows_of_experts(problem).sum()), float(ITEMSIZE[signature.out_dtype])
    down = signature.stage == "down"
    outputs = problem.tokens if down else int(rows)
    read = splits * (signature.top_k if down else signature.halves)
    return LaunchWork(
        "combine" if down else "join",
        programs=outputs * -(-signature.n // columns),
        steps=1,
        step_flops=0.0,
        mma_dtype="fp32",
        step_bytes=read * columns * partial_bytes,
        scalar_ops=2.0 * read * columns,
        dram_bytes=signature.n * (rows * splits * signature.halves * partial_bytes + outputs * out_bytes),
        epilogue_bytes=columns * out_bytes,
    )


def quantise_work(problem: MoeGemmProblem, entry: str, passes_bytes: float) -> LaunchWork:
    """One pass over the activations, a row to a program; ``passes_bytes`` are moved of each element."""
    signature = problem.signature
    rows = problem.tokens if signature.stage == "up" else int(rows_of_experts(problem).sum())
    return LaunchWork(
        entry,
        programs=rows,
        steps=1,
        step_flops=0.0,
        mma_dtype="fp32",
        step_bytes=signature.k * passes_bytes,
        scalar_ops=6.0 * signature.k,
        dram_bytes=rows * signature.k * passes_bytes,
        epilogue_bytes=float(signature.k),
    )


def grouped_work(
    signature: MoeGemmSignature,
    precision: Precision,
    config_tile: tuple[int, int, int],
    problem: MoeGemmProblem,
    *,
    weights_first: bool,
    partial_dtype: str,
    columns: int,
    split_k: int = 1,
    resident: int = 0,
) -> tuple[LaunchWork, ...]:
    """Every launch of a grouped GEMM, in order: quantising activations, the product, the sum over a token's experts."""
    before: tuple[LaunchWork, ...] = ()
    if precision.x_scales is not None:
        size, rounded = float(ITEMSIZE[signature.x_dtype]), precision.x_bits / 8
        if precision.x_scales.granularity == "tensor":
            before = (quantise_work(problem, "row_peaks", size), quantise_work(problem, "quantise", size + rounded))
        else:
            before = (quantise_work(problem, "quantise", size + rounded),)
    partial = signature.stage == "down" or split_k > 1
    out_bytes = float(ITEMSIZE[partial_dtype if partial else signature.out_dtype])
    product = gemm_work(
        problem, precision, config_tile, weights_first=weights_first, out_bytes=out_bytes, split_k=split_k
    )
    product = replace(product, resident=resident)
    if not partial:
        return (*before, product)
    return (*before, product, combine_work(problem, out_bytes, columns, split_k))
