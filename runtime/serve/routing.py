"""Routing at run time: choosing experts, and sorting tokens by expert, into buffers that callers reuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tilewright.codegen.routing import spec as numpy_routing
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.torch.readable import require_plain, resolved
from tilewright.runtime.torch.routing import (
    require_ids,
    require_logits,
    softmax_topk_on_device,
    sort_tokens_on_device,
)

_NATIVE = native_for_torch()
_HOST = ("cpu",)
_ANYWHERE = ("cpu", "cuda")
_PLACES = {_HOST: "the CPU", _ANYWHERE: "the CPU or a GPU"}


@dataclass(frozen=True)
class Routing:
    """How tokens are routed where no tuned gate does it."""

    choose: Callable[[Tensor, bool, Tensor, Tensor], None]
    """As :func:`softmax_topk_into`."""
    sort: Callable[[Tensor, int, Tensor, Tensor, Tensor], int]
    """As :func:`sort_tokens_into`."""


def host_routing() -> Routing:
    """On the CPU, where every value is checked."""
    return Routing(softmax_topk_into, sort_tokens_into)


def device_routing(*, check_values: bool) -> Routing:
    """On a GPU, whose values are looked at only where that is asked for: it waits for the device."""

    def choose(logits: Tensor, renormalize: bool, topk_ids: Tensor, topk_weights: Tensor) -> None:
        _require_beside("router_logits", logits, topk_ids)
        _require_no_grad(logits, "router_logits")
        logits = resolved(logits.detach())
        if check_values:
            require_logits(logits)
        softmax_topk_on_device(logits, renormalize, topk_ids, topk_weights)

    def sort(topk_ids: Tensor, experts: int, row_token: Tensor, expert_offsets: Tensor, slot_row: Tensor) -> int:
        _require_beside("topk_ids", topk_ids, slot_row)
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise TilewrightError(f"topk_ids has dtype {topk_ids.dtype}; expected int32 or int64 [tokens, top_k]")
        if check_values:
            require_ids(topk_ids, experts)
        return sort_tokens_on_device(resolved(topk_ids), experts, row_token, expert_offsets, slot_row)

    return Routing(choose, sort)


def _require_beside(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise TilewrightError(f"{name} is on {tensor.device}, and the experts on {other.device}; put it there, too")


def sort_tokens(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort picks by expert, picks of the same expert staying in their order.

    Args:
        topk_ids: int32 or int64 [tokens, top_k]; -1 says that another rank computes this pick, and gets no row.
        experts: experts on this rank.

    Returns:
        ``row_token`` [rows], the token of each row; ``expert_offsets`` [experts + 1], where each expert's rows begin
        and end; ``slot_row`` [tokens, top_k], the row of each pick or -1. All int32. On a GPU ``row_token`` always has
        tokens * top_k elements, of which ``expert_offsets[-1]`` count.

    Raises:
        TilewrightError: for a tensor of another kind, and on a CPU for an id out of range, which is named; on a GPU
            such a pick gets no row.

    """
    shape, device = _ids_shape(topk_ids, _ANYWHERE), topk_ids.device
    if experts < 1:
        raise TilewrightError(f"cannot sort tokens for {experts} experts; there must be at least 1")
    row_token = torch.empty(shape[0] * shape[1], dtype=torch.int32, device=device)
    expert_offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    slot_row = torch.empty(shape, dtype=torch.int32, device=device)
    if device.type == "cuda":
        sort_tokens_on_device(resolved(topk_ids), experts, row_token, expert_offsets, slot_row)
        return row_token, expert_offsets, slot_row
    rows = sort_tokens_into(topk_ids, experts, row_token, expert_offsets, slot_row)
    return row_token[:rows], expert_offsets, slot_row


def sort_tokens_into(
    topk_ids: Tensor, experts: int, row_token: Tensor, expert_offsets: Tensor, slot_row: Tensor
) -> int:
    """:func:`sort_tokens` into contiguous int32 buffers; ``row_token`` must hold tokens * top_k or more.

    Returns:
        How many rows there are; ``row_token`` beyond them keeps what it held.

    Raises:
        TilewrightError: for a tensor of another kind, and for an id out of range, which is named.

    """
    if _NATIVE is not None:
        rows: int = _NATIVE.sort_tokens(topk_ids, experts, row_token, expert_offsets, slot_row)
        if rows >= 0:
            return rows
    tokens, top_k = _ids_shape(topk_ids)
    order = numpy_routing.sort_tokens(resolved(topk_ids).numpy(), experts)
    _require("row_token", row_token, torch.int32, (max(tokens * top_k, row_token.numel()),))
    _require("expert_offsets", expert_offsets, torch.int32, (experts + 1,))
    _require("slot_row", slot_row, torch.int32, (tokens, top_k))
    row_token.numpy()[: len(order.row_token)] = order.row_token
    expert_offsets.numpy()[:] = order.expert_offsets
    slot_row.numpy()[:] = order.slot_row
    return len(order.row_token)


def softmax_topk(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The ``top_k`` most probable experts of each token, most probable first, lower ids first among equals.

    Args:
        logits: fp32 [tokens, experts]; -inf rules an expert out.
        top_k: experts per token.
        renormalize: whether a token's weights sum to 1; if not, they are shares of the softmax over all experts.

    Returns:
        ``topk_ids`` int32 and ``topk_weights`` fp32, both [tokens, top_k].

    Raises:
        TilewrightError: for a tensor of another kind, an impossible ``top_k``, and on a CPU for logits without a
            softmax (NaN, +inf or nothing but -inf), whose token is named.

    """
    tokens, experts = _logits_shape(logits, _ANYWHERE)
    if not 1 <= top_k <= experts:
        raise TilewrightError(f"cannot choose {top_k} of {experts} experts; top_k must be from 1 to {experts}")
    topk_ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    topk_weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if logits.device.type == "cuda":
        softmax_topk_on_device(resolved(logits.detach()), renormalize, topk_ids, topk_weights)
    else:
        softmax_topk_into(logits, renormalize, topk_ids, topk_weights)
    return topk_ids, topk_weights


def softmax_topk_into(logits: Tensor, renormalize: bool, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """:func:`softmax_topk` into contiguous buffers [tokens, top_k], int32 and fp32, whose shape gives ``top_k``.

    Raises:
        TilewrightError: as :func:`softmax_topk` does.

    """
    if isinstance(logits, Tensor):
        _require_no_grad(logits, "logits")
    if _NATIVE is not None and _NATIVE.softmax_topk(logits, renormalize, topk_ids, topk_weights):
        return
    tokens, experts = _logits_shape(logits)
    top_k = topk_ids.shape[-1]
    _require("topk_ids", topk_ids, torch.int32, (tokens, top_k))
    _require("topk_weights", topk_weights, torch.float32, (tokens, top_k))
    if not 1 <= top_k <= experts:
        raise TilewrightError(f"cannot choose {top_k} of {experts} experts; top_k must be from 1 to {experts}")
    values = resolved(logits.detach()).numpy()
    largest = values.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        token = int(np.argmin(np.isfinite(largest[:, 0])))
        raise TilewrightError(
            f"token {token} has a largest router logit of {largest[token, 0]}, so that there is no softmax; "
            "logits must be numbers, or -inf for experts that are ruled out"
        )
    ids = np.argsort(-values, axis=1, kind="stable")[:, :top_k]
    chosen = np.exp(np.take_along_axis(values, ids, axis=1) - largest)
    total = chosen.sum(axis=1) if renormalize else np.exp(values - largest).sum(axis=1)
    topk_ids.numpy()[:] = ids
    topk_weights.numpy()[:] = chosen / total[:, None]


def _ids_shape(topk_ids: Tensor, where: tuple[str, ...] = _HOST) -> tuple[int, int]:
    if isinstance(topk_ids, Tensor):
        require_plain(topk_ids, "topk_ids")
    if not isinstance(topk_ids, Tensor) or topk_ids.device.type not in where or topk_ids.dim() != 2:
        raise TilewrightError(
            f"topk_ids is {_describe(topk_ids)}; expected int32 or int64 [tokens, top_k] on {_PLACES[where]}"
        )
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TilewrightError(f"topk_ids has dtype {topk_ids.dtype}; expected int32 or int64 [tokens, top_k]")
    return topk_ids.shape[0], topk_ids.shape[1]


def _logits_shape(logits: Tensor, where: tuple[str, ...] = _HOST) -> tuple[int, int]:
    expected = f"expected torch.float32 [tokens, experts] on {_PLACES[where]}"
    if isinstance(logits, Tensor):
        require_plain(logits, "logits")
    if not isinstance(logits, Tensor) or logits.device.type not in where or logits.dim() != 2 or logits.shape[1] == 0:
        raise TilewrightError(f"logits is {_describe(logits)}; {expected}")
    if logits.dtype is not torch.float32:
        raise TilewrightError(f"logits has dtype {logits.dtype}; {expected}")
    return logits.shape[0], logits.shape[1]


def _require_no_grad(logits: Tensor, name: str) -> None:
    if logits.requires_grad and torch.is_grad_enabled():
        raise TilewrightError(f"{name} requires grad, but routing has no backward pass; use torch.no_grad()")


def _require(name: str, buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    require_plain(buffer, name)
    if buffer.is_neg():
        raise TilewrightError(f"{name} has the negative bit set, and is to be written; pass a plain tensor")
    if buffer.dtype is not dtype or tuple(buffer.shape) != shape or not buffer.is_contiguous():
        raise TilewrightError(f"{name} is {_describe(buffer)}; expected a contiguous buffer of {dtype} {list(shape)}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"
