"""What kind of attention a traced call is."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tilewright.codegen.models.inspection.refusal import Refusal
from tilewright.codegen.models.inspection.tracing import AttentionCall

_WITHOUT_MEANING = frozenset({"position_ids", "cache_position", "input_ids", "position_embeddings", "attention_mask"})
"""Tensors that Transformers hands through to every attention function."""
_SINKS = ("s_aux", "sinks")
_FAR = 4096
"""Tokens after which a window shows, where nothing says how long it is."""


def read_attention(call: AttentionCall) -> dict[str, Any] | Refusal:
    """Fields of ``AttentionLayers`` but for ``calls``, or why no template computes it."""
    heads, kv_heads = call.q[1], call.k[1]
    scale = call.options.get("scaling")
    if scale is None:
        scale = getattr(call.module, "scaling", None) or call.q[3] ** -0.5
    if not isinstance(scale, int | float) or scale <= 0:
        return Refusal("its scale is computed while it runs")
    if call.q[3] != call.k[3] or call.k[1:3] != call.v[1:3] or heads % kv_heads:
        return Refusal(f"its queries {list(call.q[1:])}, keys {list(call.k[1:])} and values {list(call.v[1:])} differ")
    if call.k[2] != call.q[2]:
        return Refusal(f"it has {call.k[2]} keys for {call.q[2]} tokens: its cache is compressed")
    if softcap := call.options.get("softcap"):
        return Refusal(f"its scores are capped (softcap={softcap:g})")
    sinks = next((s for name in _SINKS if isinstance(s := call.options.get(name), Tensor)), None)
    if sinks is not None and sinks.numel() != heads:
        return Refusal(f"its sinks {list(sinks.shape)} are not one for every head")
    for name, value in call.options.items():
        if isinstance(value, Tensor) and name not in (*_SINKS, *_WITHOUT_MEANING):
            return Refusal(f"it is given {name!r}")
    window = _window(call)
    if isinstance(window, Refusal):
        return window
    latent, rope = _latent(call)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": call.q[3],
        "value_dim": call.v[3],
        "scale": float(scale),
        "window": window,
        "sinks": sinks is not None,
        "latent_dim": latent,
        "rope_dim": rope,
    }


def _window(call: AttentionCall) -> int | Refusal:
    if call.mask is None:
        causal = call.options.get("is_causal")
        if not (getattr(call.module, "is_causal", False) if causal is None else causal):
            return Refusal("it is not causal")
        return int(call.options.get("sliding_window") or 0)
    if not hasattr(call.mask, "tilewright"):
        return Refusal("it has a mask of its own, by which some of the tokens before are not seen")
    function, local = call.mask.tilewright
    return _window_of(function, int(local or 0))


def _window_of(function: Any, local: int) -> int | Refusal:
    """What a mask shows to queries far from the beginning.

    A mask by chunks of positions is that of a whole sequence for all that is shorter than a chunk.
    """
    counts = []
    reach = local or _FAR
    _without_padding(function)
    for query in (2 * reach, 3 * reach + 1):  # where in a chunk differs
        keys = torch.arange(query + 2)
        zero = torch.zeros((), dtype=torch.long)
        try:
            seen = function(zero, zero, torch.tensor(query), keys)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return Refusal("its mask depends on more than positions")
        seen = torch.as_tensor(seen).expand(keys.shape)
        count = int(seen.sum())
        if not count or bool(seen[query + 1]) or not bool(seen[query + 1 - count : query + 1].all()):
            return Refusal("its mask is neither causal nor a window")
        counts.append((query, count))
    if all(count == query + 1 for query, count in counts):
        return 0
    if counts[0][1] == counts[1][1]:
        return counts[0][1]
    if local and all(count == query % local + 1 for query, count in counts):
        return 0
    return Refusal("its mask is neither causal nor a window")


def _without_padding(function: Any) -> None:
    """Let a mask by chunks know that nothing is padded on the left; it looks that up where there are no values."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        held = cell.cell_contents
        if name == "left_padding" and isinstance(held, Tensor) and held.is_meta:
            cell.cell_contents = torch.zeros(held.shape, dtype=torch.long)
        for inner in held if isinstance(held, tuple | list) else (held,):
            if inspect.isfunction(inner):
                _without_padding(inner)


def _latent(call: AttentionCall) -> tuple[int, int]:
    """Lengths of the latent vector and of the part with positions, where one linear layer makes both."""
    latent, rope = (getattr(call.module, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    made = {child.out_features for child in call.module.children() if hasattr(child, "out_features")}
    if isinstance(latent, int) and isinstance(rope, int) and latent + rope in made:
        return latent, rope
    return 0, 0
