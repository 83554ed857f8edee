"""attention as the runtime serves it: nothing to pack, and plain torch where no tuned kernel serves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.errors import TilewrightError
from tilewright.runtime.ops.base import BoundWeights, ServedOp
from tilewright.runtime.serve.plans import Resolution
from tilewright.runtime.torch.attention_on_device import attention_fallback
from tilewright.runtime.torch.plain import plain_torch
from tilewright.runtime.torch.readable import require_plain, resolved


class ServedAttention(ServedOp[AttentionSignature]):
    """Refers to the sinks as they are."""

    name: ClassVar[str] = "attention"

    def bind(
        self,
        signature: AttentionSignature,
        weights: Mapping[str, Tensor],
        resolution: Resolution,
        *,
        keep_weights: bool,
    ) -> BoundWeights:
        """See :class:`ServedOp`. The sinks are too small to be worth a copy."""
        del keep_weights
        sinks = weights.get("sinks")
        fallback = fallback_for if resolution.device.is_host else attention_fallback
        return BoundWeights(
            dict(weights),
            fallback(signature, sinks),
            lambda: dict(weights),
            weight_bytes=0 if sinks is None else sinks.nbytes,
        )


def fallback_for(signature: AttentionSignature, sinks: Tensor | None) -> Callable[..., None]:
    """Torch implementation of ``signature``, called with the tensors of a call without the sinks, in order."""

    def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor) -> None:
        with plain_torch():
            for row, length in enumerate(lengths.tolist()):
                first = max(0, length - signature.window) if signature.window else 0
                k, v = (_gather(signature, cache, block_table[row], first, length) for cache in (k_cache, v_cache))
                # The query heads of a group become rows of one product, which torch computes fastest.
                folded = q[row].view(signature.kv_heads, signature.group, signature.head_dim)
                out[row] = _attend(signature, folded, k, v, sinks).reshape(signature.heads, signature.value_dim)

    def decode_latent(q: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor) -> None:
        rows = kv_cache.unsqueeze(2)  # of one head
        decode(q, rows, rows[..., : signature.value_dim], block_table, lengths, out)

    def prefill(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor) -> None:
        with plain_torch():
            boundaries: Sequence[int] = cu_seqlens.tolist()
            for begin, end in itertools.pairwise(boundaries):
                queries, keys, values = (tensor[begin:end].transpose(0, 1) for tensor in (q, k, v))
                if signature.group > 1:
                    keys, values = (tensor.repeat_interleave(signature.group, dim=0) for tensor in (keys, values))
                out[begin:end] = _attend(signature, queries, keys, values, sinks, causal=True).transpose(0, 1)

    if signature.latent:
        return decode_latent
    return decode if signature.stage == "decode" else prefill


def _gather(signature: AttentionSignature, cache: Tensor, table_row: Tensor, first: int, end: int) -> Tensor:
    """[kv_heads, end - first, dim]: those tokens of a sequence, in order."""
    first_page = first // signature.page_size
    pages = cache[table_row[first_page : -(-end // signature.page_size)].long()]
    by_head = pages.transpose(0, 1) if signature.kv_layout == "hnd" else pages.permute(2, 0, 1, 3)
    skipped = first_page * signature.page_size
    return by_head.reshape(signature.kv_heads, -1, cache.shape[-1])[:, first - skipped : end - skipped]


def _attend(
    signature: AttentionSignature, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, causal: bool = False
) -> Tensor:
    """[batch, rows, value_dim] of ``q`` [batch, rows, head_dim] by keys and values [batch, tokens, dim].

    ``causal``: row i sees tokens up to i, of the last ones as many as the window holds; else it sees them all.
    """
    hidden = _hidden(signature, q.shape[1]) if causal and (signature.window or sinks is not None) else None
    if sinks is None:
        mask = None if hidden is None else ~hidden
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=signature.scale
        )
    scores = signature.scale * (q @ k.transpose(1, 2))
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    rows = sinks.view(q.shape[0], -1, 1).expand(-1, q.shape[1], 1)
    weights = torch.softmax(torch.cat((scores, rows), dim=2), dim=2)
    return weights[..., :-1] @ v


def _hidden(signature: AttentionSignature, tokens: int) -> Tensor:
    """[tokens, tokens], true where the token of a column is not seen by that of a row."""
    distance = torch.arange(tokens, device="cpu")[:, None] - torch.arange(tokens, device="cpu")
    hidden = distance < 0
    return hidden | (distance >= signature.window) if signature.window else hidden


def checked_sinks(sinks: Tensor, heads: int) -> Tensor:
    """``sinks`` as a contiguous fp32 tensor [heads], where it lies.

    Raises:
        TilewrightError: when it is anything else.

    """
    if not isinstance(sinks, Tensor) or sinks.device.type not in ("cpu", "cuda") or sinks.dtype is not torch.float32:
        raise TilewrightError(f"attention: sinks must be a torch.float32 tensor [{heads}] on the CPU or a GPU")
    require_plain(sinks, "attention: sinks")
    if tuple(sinks.shape) != (heads,):
        raise TilewrightError(f"attention: sinks has shape {list(sinks.shape)}; expected [{heads}]")
    if not bool(torch.isfinite(sinks).all()):
        raise TilewrightError("attention: sinks holds NaN or an infinity; every head needs a finite sink")
    return resolved(sinks.detach()).contiguous()
