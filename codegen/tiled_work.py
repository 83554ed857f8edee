"""Work of the launches that most GPU templates consist of: from sizes and tiles to :class:`LaunchWork`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.work import LaunchWork

ELEMENT_BYTES = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "fp8_e4m3": 1.0, "nvfp4": 0.5}


@dataclass(frozen=True)
class WeightFormat:
    """How weights lie in memory, and what taking one apart costs."""

    bytes_per_element: float
    unpack_ops: float = 0.0
    """Per element, outside the matrix unit; 0 where it reads the format itself."""


def gemm_work(entry: str, m: int, n: int, k: int, tile: tuple[int, int, int], dtype: str) -> LaunchWork:
    """One dense product [m, k] x [k, n]; ``tile`` is rows, columns and the length of one step."""
    rows, columns, depth = tile
    size = ELEMENT_BYTES[dtype]
    return LaunchWork(
        entry,
        programs=_ceil(m, rows) * _ceil(n, columns),
        steps=_ceil(k, depth),
        step_flops=2.0 * rows * columns * depth,
        mma_dtype=dtype,
        step_bytes=(rows + columns) * depth * size,
        scalar_ops=0.0,
        dram_bytes=(m * k + n * k + m * n) * size,
        epilogue_bytes=rows * columns * size,
        tile=(rows, columns),
    )


def grouped_gemm_work(
    entry: str,
    rows_of_expert: NDArray[np.int64] | Sequence[int],
    n: int,
    k: int,
    *,
    tile: tuple[int, int, int],
    dtype: str,
    weights: WeightFormat,
    halves: int = 1,
    split_k: int = 1,
    x_rows: int | None = None,
    out_bytes: float = 2.0,
) -> LaunchWork:
    """Rows sorted by expert, times each expert's weight [halves * n, k]; every expert's rows are padded to tiles.

    Args:
        entry: name of the entry point.
        rows_of_expert: rows that fall on each expert; 0 for one that has none and whose weights are not read.
        n: output columns, after the activation.
        k: length of the reduction.
        tile: rows, columns of one half, and the length of one step.
        dtype: of the operands that the matrix unit gets.
        weights: how they lie in memory.
        halves: 2 where every output column needs a gate and an up column.
        split_k: programs that share one reduction.
        x_rows: distinct rows of the input: tokens, where they are gathered; None: as many as are computed.
        out_bytes: of an element of the output.

    """
    counts = np.asarray(rows_of_expert, np.int64)
    rows, columns, depth = tile
    size = ELEMENT_BYTES[dtype]
    total, active = int(counts.sum()), int((counts > 0).sum())
    steps = _ceil(k, depth)
    share = _ceil(steps, split_k)
    element = halves * columns * depth
    unique_x = total if x_rows is None else min(x_rows, total)
    partial = 4.0 * 2 * (split_k - 1)  # fp32 partial sums, written and read again
    return LaunchWork(
        entry,
        programs=int((-(-counts // rows)).sum()) * _ceil(n, columns) * split_k,
        steps=share,
        step_flops=2.0 * rows * element,
        mma_dtype=dtype,
        step_bytes=rows * depth * size + element * weights.bytes_per_element,
        scalar_ops=element * weights.unpack_ops,
        dram_bytes=active * halves * n * k * weights.bytes_per_element
        + unique_x * k * size
        + total * n * (out_bytes + partial * halves),
        epilogue_bytes=rows * columns * (out_bytes if split_k == 1 else 4.0 * halves),
        tile=(rows, halves * columns),
    )


def decode_attention_work(
    entry: str,
    lengths: NDArray[np.int64] | Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    block_kv: int,
    splits: int,
    dtype: str,
    kv_bytes: float,
    kv_elements: int = 0,
    window: int = 0,
    block_rows: int = 16,
) -> LaunchWork:
    """One query per sequence against its paged cache; ``splits`` programs share a sequence's keys.

    A token has ``kv_elements`` elements of ``kv_bytes`` in the cache for each key/value head; 0: a key and a value.
    The group of query heads of one key/value head is cut into tiles of ``block_rows`` rows. ``steps`` are those of the
    longest sequence's programs, since that is when the launch ends, where there is at most one block for each; the
    traffic is that of all.
    """
    seen = np.asarray(lengths, np.int64)
    seen = np.minimum(seen, window) if window else seen
    group = heads // kv_heads
    row_tiles = _ceil(group, block_rows)
    steps_of = np.ceil(np.ceil(seen / block_kv) / splits)
    mean_steps = float(steps_of.mean()) if len(seen) else 0.0
    both = head_dim + value_dim
    token_bytes = (kv_elements or both) * kv_bytes
    return LaunchWork(
        entry,
        programs=len(seen) * kv_heads * row_tiles * splits,
        steps=mean_steps,
        step_flops=2.0 * block_rows * block_kv * both,
        mma_dtype=dtype,
        step_bytes=block_kv * token_bytes,
        scalar_ops=4.0 * block_rows * block_kv,
        dram_bytes=float(seen.sum()) * kv_heads * token_bytes + len(seen) * heads * both * ELEMENT_BYTES[dtype],
        epilogue_bytes=block_rows * value_dim * (4.0 if splits > 1 else ELEMENT_BYTES[dtype]),
        tile=(block_rows, value_dim),
    )


def prefill_attention_work(
    entry: str,
    lengths: NDArray[np.int64] | Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    block_q: int,
    block_kv: int,
    dtype: str,
    kv_bytes: float,
    window: int = 0,
    packed: int = 1,
) -> LaunchWork:
    """Causal attention of whole sequences: a program takes ``block_q`` queries over what they may see.

    They are queries of ``packed`` heads, which share the keys and values that it loads.
    """
    programs, steps = 0, 0
    for length in np.asarray(lengths, np.int64):
        ends = np.minimum(np.arange(block_q, int(length) + block_q, block_q), length)
        begins = np.maximum(0, ends - block_q - window + 1) if window else np.zeros_like(ends)
        programs += len(ends)
        steps += int((-(-ends // block_kv) - begins // block_kv).sum())
    tokens, both, size = int(np.sum(lengths)), head_dim + value_dim, ELEMENT_BYTES[dtype]
    rows = block_q * packed
    return LaunchWork(
        entry,
        programs=programs * kv_heads * _ceil(heads // kv_heads, packed),
        steps=steps / max(1, programs),
        step_flops=2.0 * rows * block_kv * both,
        mma_dtype=dtype,
        step_bytes=block_kv * both * kv_bytes,
        scalar_ops=4.0 * rows * block_kv,
        dram_bytes=tokens * (heads * both * size + kv_heads * both * kv_bytes),
        epilogue_bytes=rows * value_dim * size,
        tile=(rows, value_dim),
    )


def gating_work(
    entry: str, tokens: int, experts: int, top_k: int, *, block_tokens: int, logit_bytes: float
) -> LaunchWork:
    """Top-k of every token's logits: one pass for the scores, one over all experts for every pick."""
    return LaunchWork(
        entry,
        programs=_ceil(tokens, block_tokens),
        steps=1,
        step_flops=0.0,
        mma_dtype="fp32",
        step_bytes=block_tokens * experts * logit_bytes,
        scalar_ops=block_tokens * experts * (4.0 + 2.0 * top_k),
        dram_bytes=tokens * (experts * logit_bytes + top_k * 8.0),
        epilogue_bytes=block_tokens * top_k * 8.0,
    )


def _ceil(size: int, unit: int) -> int:
    return -(-size // unit)
