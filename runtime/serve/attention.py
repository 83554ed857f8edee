"""Attention of an engine: one query per sequence against a paged cache, and prompts packed one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.codegen.ops.attention.signature import DEFAULT_PAGE_SIZE, AttentionSignature, KvLayout
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import TORCH_DTYPES
from tilewright.runtime.ops.attention import checked_sinks
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.prepared import PreparedCall
from tilewright.runtime.torch.dtypes import DTYPE_NAMES
from tilewright.runtime.torch.readable import require_plain


class PagedDecode(PreparedCall):
    """Decoding: ``decode(q, k_cache, v_cache, block_table, lengths)`` gives the output of each sequence's last token.

    ``decode.call(q, k_cache, v_cache, block_table, lengths, out)`` is the same without a level of Python.
    """

    __slots__ = ()

    signature: AttentionSignature

    @classmethod
    def of(
        cls,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
        kv_layout: KvLayout = "hnd",
        scale: float | None = None,
        window: int = 0,
        sinks: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        options: ServeOptions = ServeOptions(),
    ) -> PagedDecode:
        """Find the tuned kernels on the device of ``options``; plain torch serves where there are none.

        Args:
            heads: query heads on this rank.
            kv_heads: key/value heads, each shared by ``heads / kv_heads`` query heads.
            head_dim: elements of a query and a key.
            value_dim: elements of a value; None: ``head_dim``.
            page_size: tokens of a page of the cache.
            kv_layout: order within a page: ``hnd`` [kv_heads, page_size, dim] or ``nhd`` [page_size, kv_heads, dim].
            scale: factor of q . k; None: 1 / sqrt(head_dim).
            window: tokens that a query sees, its own included; 0: all.
            sinks: fp32 [heads], learned logits in the softmax's denominator, on the device of ``options``; None: there
                are none.
            dtype: of queries and outputs: fp32, on a GPU also bf16 and fp16.
            kv_dtype: of keys and values: ``dtype``, or float8_e4m3fn beside bf16 and fp16; None: ``dtype``.
            options: which plans may serve, where, and how.

        Raises:
            TilewrightError: when the arguments do not fit together.

        """
        signature = AttentionSignature(
            stage="decode",
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim or 0,
            scale=scale or 0.0,
            window=window,
            sinks=sinks is not None,
            page_size=page_size,
            kv_layout=kv_layout,
            q_dtype=_name(dtype),
            kv_dtype=_name(kv_dtype or dtype),
            out_dtype=_name(dtype),
        )
        return cls.prepare(signature, _weights(sinks, heads), options=options)

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: [sequences, heads, head_dim], of the dtype and on the device that this was made for, as all tensors.
            k_cache: [pages, kv_heads, page_size, head_dim], or as ``kv_layout`` says.
            v_cache: likewise with ``value_dim``.
            block_table: int32 [sequences, table_pages]: pages of each sequence; those beyond its length are not read.
            lengths: int32 [sequences]: tokens of each sequence in the cache, the query's own included.
            out: [sequences, heads, value_dim] to write; made when None.

        Raises:
            TilewrightError: for tensors that do not fit, a length of 0 or beyond the table, and a page in use that does
                not exist (on a GPU only with ``check_values``). Nothing is computed then.

        """
        result: Tensor = self.call(q, k_cache, v_cache, block_table, lengths, _output(self, q, out))
        return result


class VarlenPrefill(PreparedCall):
    """Prefill: ``prefill(q, k, v, cu_seqlens)`` gives the outputs of all tokens of some sequences, causally.

    ``prefill.call(q, k, v, cu_seqlens, out)`` is the same without a level of Python.
    """

    __slots__ = ()

    signature: AttentionSignature

    @classmethod
    def of(
        cls,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        scale: float | None = None,
        window: int = 0,
        sinks: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        options: ServeOptions = ServeOptions(),
    ) -> VarlenPrefill:
        """Find the tuned kernels on the device of ``options``; plain torch serves where there are none.

        Args: as those of :meth:`PagedDecode.of`.

        Raises:
            TilewrightError: when the arguments do not fit together.

        """
        signature = AttentionSignature(
            stage="prefill",
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim or 0,
            scale=scale or 0.0,
            window=window,
            sinks=sinks is not None,
            q_dtype=_name(dtype),
            kv_dtype=_name(kv_dtype or dtype),
            out_dtype=_name(dtype),
        )
        return cls.prepare(signature, _weights(sinks, heads), options=options)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            q: [tokens, heads, head_dim], the sequences one after the other, of the dtype and on the device that this
                was made for, as all tensors.
            k: [tokens, kv_heads, head_dim].
            v: [tokens, kv_heads, value_dim].
            cu_seqlens: int32 [sequences + 1]: where each sequence begins, and ``tokens``.
            out: [tokens, heads, value_dim] to write; made when None.

        Raises:
            TilewrightError: for tensors that do not fit, and offsets that do not rise from 0 to ``tokens`` (a sequence
                of no tokens has no place; on a GPU only with ``check_values``). Nothing is computed then.

        """
        result: Tensor = self.call(q, k, v, cu_seqlens, _output(self, q, out))
        return result


def _weights(sinks: Tensor | None, heads: int) -> dict[str, Tensor]:
    return {} if sinks is None else {"sinks": checked_sinks(sinks, heads)}


def _name(dtype: torch.dtype) -> str:
    """As signatures have it; of one that they do not know, torch's."""
    return DTYPE_NAMES.get(dtype, str(dtype))


def _output(prepared: PagedDecode | VarlenPrefill, q: Tensor, out: Tensor | None) -> Tensor:
    """``out``, or a new output for ``q``."""
    if out is not None:
        return out
    signature = prepared.signature
    if isinstance(q, Tensor):
        require_plain(q, f"{signature.title}: q")
    if not isinstance(q, Tensor) or q.dim() == 0:
        found = f"shape {list(q.shape)}" if isinstance(q, Tensor) else f"type {type(q).__name__}"
        raise TilewrightError(
            f"{signature.title}: q must be a torch tensor [tokens, {signature.heads}, {signature.head_dim}]; "
            f"it has {found}"
        )
    return torch.empty(
        (q.shape[0], signature.heads, signature.value_dim), dtype=TORCH_DTYPES[signature.out_dtype], device=q.device
    )
