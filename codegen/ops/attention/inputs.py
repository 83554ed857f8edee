"""What attention is measured and checked on: lengths of sequences, where their pages lie, and the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError

_DRAWN = (1 << 20) - 3
"""Values that are drawn; larger tensors repeat them. A prime, so that no two pages or heads begin alike."""
_STEEP = 30.0
"""Factor of the queries of steep problems: exp of their scores overflows unless the largest is subtracted."""
_FREE_PAGES = 2
_SPARE_COLUMNS = 1


def split_tokens(spec: RoutingSpec, total: int, count: int, seed: int) -> NDArray[np.int32]:
    """Lengths [count], each at least 1, that add up to ``total``: even for ``balanced``, skewed for ``power-law``.

    Raises:
        TilewrightError: for recorded routing, which says nothing of lengths.

    """
    if spec.kind == "recorded":
        raise TilewrightError("attention knows no recorded routing; give --routing balanced or power-law[:ALPHA]")
    shares = np.ones(count)
    if spec.alpha is not None:
        random = np.random.default_rng((seed, 6))
        shares = random.permutation(np.arange(1, count + 1, dtype=float) ** -spec.alpha)
    ends = np.floor(np.cumsum(shares) / shares.sum() * (total - count) + 0.5).astype(np.int64)
    lengths: NDArray[np.int32] = (np.diff(ends, prepend=0) + 1).astype(np.int32)
    return lengths


def draw(shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.float32]:
    """Normally distributed values, as projections of normalised hidden states are."""
    size = int(np.prod(shape))
    values = random.standard_normal(min(size, _DRAWN), np.float32)
    return np.resize(values, size).reshape(shape)


def draw_queries(
    signature: AttentionSignature, tokens: int, random: np.random.Generator, *, steep: bool
) -> NDArray[np.float32]:
    """``q`` [tokens, heads, head_dim], whose scores are normally distributed, or far apart with ``steep``."""
    q = draw((tokens, signature.heads, signature.head_dim), random)
    # Scores of unit variance whatever the scale, as training leaves them.
    usual = np.float32(signature.head_dim**-0.5 / signature.scale)
    return q * (usual * np.float32(_STEEP if steep else 1.0))


def draw_cache(
    signature: AttentionSignature, lengths: NDArray[np.int32], random: np.random.Generator
) -> dict[str, NDArray[np.float32] | NDArray[np.int32]]:
    """The cache's tensors, ``block_table``, ``lengths``: pages in random order, as a server leaves them after a while.

    What no sequence uses is NaN, and -1 in the table: a result tells whether it was read.
    """
    pages_of = -(-lengths.astype(np.int64) // signature.page_size)
    used = int(pages_of.sum())
    order = random.permutation(used + _FREE_PAGES).astype(np.int32)
    table = np.full((len(lengths), int(pages_of.max()) + _SPARE_COLUMNS), -1, np.int32)
    in_use = np.arange(table.shape[1]) < pages_of[:, None]
    table[in_use] = order[:used]
    by_head = signature.kv_layout == "hnd"
    caches = {}
    for spec in signature.tensors():
        if not spec.name.endswith("_cache"):
            continue
        page = tuple(int(size) for size in spec.dims[1:])
        cache = draw((len(order), *page), random)
        cache[order[used:]] = np.nan
        for row, length in enumerate(lengths.tolist()):
            if rest := length % signature.page_size:
                last = cache[table[row, pages_of[row] - 1]]
                (last[:, rest:] if by_head else last[rest:])[...] = np.nan
        caches[spec.name] = cache
    return {**caches, "block_table": table, "lengths": lengths}


def gather_cache(
    signature: AttentionSignature, cache: NDArray[np.float32], table_row: NDArray[np.int32], length: int
) -> NDArray[np.float32]:
    """[length, kv_heads, dim]: what a sequence has in the cache, in order."""
    pages = cache[table_row[: -(-length // signature.page_size)]]
    if signature.kv_layout == "hnd":
        pages = pages.swapaxes(1, 2)
    return pages.reshape(-1, signature.kv_heads, cache.shape[-1])[:length]


def gather_sequence(
    signature: AttentionSignature, inputs: Mapping[str, NDArray[Any]], row: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Keys and values [length, kv_heads, dim] of one sequence in the cache."""
    table_row, length = inputs["block_table"][row], int(inputs["lengths"][row])
    if signature.latent:
        rows = gather_cache(signature, inputs["kv_cache"], table_row, length)
        return rows, rows[..., : signature.value_dim]
    k, v = (gather_cache(signature, inputs[name], table_row, length) for name in ("k_cache", "v_cache"))
    return k, v
