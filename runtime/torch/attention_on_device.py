"""attention in plain torch on a GPU: nothing is waited for, so that lengths decide by masks what is seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.runtime.torch.plain import plain_torch

_ROWS_AT_ONCE = 1024
"""Queries of a prompt whose masks are made at once."""


def attention_fallback(signature: AttentionSignature, sinks: Tensor | None) -> Callable[..., None]:
    """Torch implementation of ``signature``, called with the tensors of a call without the sinks, in order.

    A sequence is read up to the end of its row of the block table, a prompt against all keys.
    """

    def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor) -> None:
        with plain_torch():
            # What lies beyond a sequence's length may be no page at all.
            pages = block_table.long().clamp(0, k_cache.shape[0] - 1)
            at = torch.arange(block_table.shape[1] * signature.page_size, device=q.device)
            for row in range(q.shape[0]):
                length = lengths[row]
                seen = at < length
                if signature.window:
                    seen &= at >= length - signature.window
                k, v = (_gather(signature, cache, pages[row], seen).to(q.dtype) for cache in (k_cache, v_cache))
                # The query heads of a group become rows of one product.
                folded = q[row].reshape(signature.kv_heads, signature.group, signature.head_dim)
                attended = _attend(signature, folded, k, v, sinks, seen.expand(signature.group, -1))
                out[row] = attended.reshape(signature.heads, signature.value_dim)

    def decode_latent(q: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor) -> None:
        rows = kv_cache.unsqueeze(2)  # of one head
        decode(q, rows, rows[..., : signature.value_dim], block_table, lengths, out)

    def prefill(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor) -> None:
        with plain_torch():
            keys, values = (tensor.transpose(0, 1).to(q.dtype) for tensor in (k, v))
            if signature.group > 1:
                keys, values = (tensor.repeat_interleave(signature.group, dim=0) for tensor in (keys, values))
            at = torch.arange(q.shape[0], dtype=cu_seqlens.dtype, device=q.device)
            sequence = torch.searchsorted(cu_seqlens, at, right=True)
            for first in range(0, q.shape[0], _ROWS_AT_ONCE):
                rows = slice(first, first + _ROWS_AT_ONCE)
                distance = at[rows, None] - at
                seen = (distance >= 0) & (sequence[rows, None] == sequence)
                if signature.window:
                    seen &= distance < signature.window
                attended = _attend(signature, q[rows].transpose(0, 1), keys, values, sinks, seen)
                out[rows] = attended.transpose(0, 1)

    if signature.latent:
        return decode_latent
    return decode if signature.stage == "decode" else prefill


def _gather(signature: AttentionSignature, cache: Tensor, pages: Tensor, seen: Tensor) -> Tensor:
    """[kv_heads, tokens, dim]: all tokens of some pages, in order; zeros for those not seen, which may be anything."""
    rows = cache[pages]
    # Latent rows come as those of one head, tokens before heads.
    by_head = rows.transpose(0, 1) if signature.kv_layout == "hnd" else rows.permute(2, 0, 1, 3)
    tokens = by_head.reshape(signature.kv_heads, -1, cache.shape[-1])
    return torch.where(seen[:, None], tokens, torch.zeros((), dtype=tokens.dtype, device=tokens.device))


def _attend(
    signature: AttentionSignature, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seen: Tensor
) -> Tensor:
    """[batch, rows, value_dim] of ``q`` [batch, rows, head_dim] by keys and values [batch, tokens, dim].

    ``seen`` [rows, tokens] is true where the query of a row sees the key of a column.
    """
    if sinks is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=signature.scale)
    scores = (signature.scale * (q @ k.transpose(1, 2)).float()).masked_fill(~seen, -torch.inf)
    rows = sinks.view(q.shape[0], -1, 1).expand(-1, q.shape[1], 1)
    weights = torch.softmax(torch.cat((scores, rows), dim=2), dim=2)
    return weights[..., :-1].to(v.dtype) @ v
