"""Attention over whole prompts on tuned kernels, where it has a plan.

Transformers lets attention implementations be chosen by name for a whole model, so that ours takes every call and hands
those to ``sdpa`` that it does not serve: steps of decoding (Transformers' cache has no pages), and whatever has a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import TORCH_DTYPES
from tilewright.runtime.serve.attention import VarlenPrefill
from tilewright.runtime.serve.handles import held
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.runtime.torch.dtypes import DTYPE_NAMES
from tilewright.runtime.torch.operators import define_operator
from tilewright.runtime.transformers.inference import SharedByCopies, wants_gradients
from tilewright.runtime.transformers.interface import sdpa

_SERVED = "_tilewright_prompts"
_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16)}
"""Of attention that is served, by the kind of device that it is on."""


@dataclass(frozen=True, eq=False)
class _Prompts(SharedByCopies):
    """What computes one attention module over a prompt."""

    prefill: VarlenPrefill


def prompts_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention implementation ``tilewright``.

    Args:
        module: of a class that calls Transformers' attention interface.
        query: [batch, heads, tokens, head_dim].
        key: [batch, kv_heads, tokens so far, head_dim].
        value: [batch, kv_heads, tokens so far, value_dim].
        attention_mask: None where every token sees those before it and itself.
        **options: as the interface has them.

    Returns:
        [batch, tokens, heads, value_dim], and None in place of the weights.

    """
    served = getattr(module, _SERVED, None)
    if served is None or not _is_whole_prompt(served.prefill, module, query, key, attention_mask, options):
        return sdpa()(module, query, key, value, attention_mask, **options)
    if torch.compiler.is_compiling():
        return torch.ops.tilewright.prompts(query, key, value, served.prefill.handle), None
    return _compute(served.prefill, query, key, value), None


def attach(module: nn.Module, options: ServeOptions) -> bool:
    """Have a plan's kernels serve ``module``; False where there is no plan for it, or none that can be loaded."""
    weight = next(module.parameters(), None)
    if weight is None or weight.dtype not in _DTYPES.get(weight.device.type, ()):
        return False
    try:
        signatures = list(_signatures(module, DTYPE_NAMES[weight.dtype]))
    except Exception:
        return False
    options = replace(options, device=weight.device)
    for signature in signatures:
        if not is_planned(signature, options):
            continue
        prefill = VarlenPrefill.prepare(signature, {}, options=options)
        if prefill.is_tuned:
            setattr(module, _SERVED, _Prompts(prefill))
            return True
    return False


def detach(module: nn.Module) -> None:
    """Undo :func:`attach`."""
    module.__dict__.pop(_SERVED, None)


def _signatures(module: Any, dtype: str) -> Iterator[AttentionSignature]:
    """What ``module`` computes over a prompt within its window, where one without a window gives the same."""
    heads = getattr(module.config, "num_attention_heads", 0)
    for window in dict.fromkeys((getattr(module, "sliding_window", None) or 0, 0)):
        try:
            yield AttentionSignature(
                stage="prefill",
                heads=heads,
                kv_heads=heads // module.num_key_value_groups,
                # Latent attention has these two, and may use the other name for something else.
                head_dim=getattr(module, "qk_head_dim", getattr(module, "head_dim", 0)),
                value_dim=getattr(module, "v_head_dim", 0),
                scale=float(module.scaling),
                window=window,
                q_dtype=dtype,
            )
        except TilewrightError:
            return  # no kernel computes such heads, so that there is no plan either


def _is_whole_prompt(
    prefill: VarlenPrefill,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> bool:
    """Whether a call is plain causal attention of tokens among themselves without gradients, as ``prefill`` takes."""
    signature = prefill.signature
    is_causal = options.get("is_causal")
    scaling = options.get("scaling")
    return (
        attention_mask is None
        and query.shape[2] == key.shape[2]
        and 1 < query.shape[2] <= (signature.window or query.shape[2])
        and (query.shape[1], key.shape[1]) == (signature.heads, signature.kv_heads)
        and query.dtype is TORCH_DTYPES[signature.q_dtype]
        and query.device == prefill.device.torch_device
        and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and (scaling is None or scaling == signature.scale)
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux", "cache"))
        and not wants_gradients(module, query)
    )


def _compute(prefill: VarlenPrefill, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, tokens = query.shape[0], query.shape[2]
    # What rotary embedding makes lies in this order already; a cache's keys and values are copied.
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in (query, key, value))
    out = torch.empty((batch * tokens, *_heads_of(prefill)), dtype=q.dtype, device=q.device)
    # On a GPU they are made by every call: a CUDA graph may be recording.
    offsets = _even_offsets(batch, tokens) if prefill.device.is_host else _offsets_on(q.device, batch, tokens)
    prefill.call(q, k, v, offsets, out)
    return out.view(batch, tokens, *_heads_of(prefill))


def _heads_of(prefill: VarlenPrefill) -> tuple[int, int]:
    return prefill.signature.heads, prefill.signature.value_dim


@lru_cache(maxsize=64)
def _even_offsets(batch: int, tokens: int) -> Tensor:
    with torch.inference_mode(mode=False):
        return _offsets_on(torch.device("cpu"), batch, tokens)


def _offsets_on(device: torch.device, batch: int, tokens: int) -> Tensor:
    return torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)


define_operator(
    "prompts(Tensor query, Tensor key, Tensor value, int handle) -> Tensor",
    compute=lambda query, key, value, handle: _compute(held(handle, VarlenPrefill), query, key, value),
    fake=lambda query, key, value, handle: query.new_empty(  # noqa: ARG005 - arguments go by name
        (query.shape[0], query.shape[2], *_heads_of(held(handle, VarlenPrefill)))
    ),
)
