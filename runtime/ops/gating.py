"""gating as the runtime serves it: nothing to pack, and plain torch where no tuned kernel serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.routing.spec import TokenOrder, pad_blocks
from tilewright.errors import TilewrightError
from tilewright.runtime.ops.base import BoundWeights, ServedOp
from tilewright.runtime.serve.plans import Resolution
from tilewright.runtime.serve.routing import sort_tokens_into
from tilewright.runtime.torch.plain import plain_torch
from tilewright.runtime.torch.readable import require_plain, resolved
from tilewright.runtime.torch.routing import pad_blocks_on_device, sort_tokens_on_device, stable_topk_on_device


class ServedGating(ServedOp[GatingSignature]):
    """Refers to the bias as it is."""

    name: ClassVar[str] = "gating"

    def bind(
        self, signature: GatingSignature, weights: Mapping[str, Tensor], resolution: Resolution, *, keep_weights: bool
    ) -> BoundWeights:
        """See :class:`ServedOp`. The bias is too small to be worth a copy."""
        del keep_weights
        bias = weights.get("bias")
        return BoundWeights(
            dict(weights),
            fallback_for(signature, bias, is_host=resolution.device.is_host),
            lambda: dict(weights),
            weight_bytes=0 if bias is None else bias.nbytes,
        )


def fallback_for(signature: GatingSignature, bias: Tensor | None, *, is_host: bool = True) -> Callable[..., None]:
    """Torch implementation of ``signature``, called with the tensors of a call without the bias, in order.

    ``is_host`` says that values of tensors can be read at once; else nothing is waited for.
    """
    topk, order = (stable_topk, _order) if is_host else (stable_topk_on_device, _order_on_device)

    def gate(logits: Tensor, topk_ids: Tensor, topk_weights: Tensor, *orders: Tensor) -> None:
        with plain_torch():
            ids, weights = _choose(signature, bias, logits, topk)
            topk_ids.copy_(ids)
            topk_weights.copy_(weights)
            if orders:
                order(signature, ids.int(), *orders)

    return gate


def stable_topk(keys: Tensor, top_k: int) -> Tensor:
    """Ids int64 [tokens, top_k] of the largest ``keys`` [tokens, experts], equal ones by rising id.

    ``torch.topk`` is several times faster than a sort, but takes any of equal keys; so it serves where none are equal.
    """
    values, ids = keys.topk(min(top_k + 1, keys.shape[1]), dim=1)
    if bool((values[:, 1:] == values[:, :-1]).any()):
        ids = keys.sort(dim=1, descending=True, stable=True).indices
    return ids[:, :top_k]


_TopK = Callable[[Tensor, int], Tensor]
"""``stable_topk``, or its like for a GPU."""


def _choose(signature: GatingSignature, bias: Tensor | None, logits: Tensor, topk: _TopK) -> tuple[Tensor, Tensor]:
    """Ids int64 and weights fp32, both [tokens, top_k]."""
    scores = torch.softmax(logits, dim=1) if signature.score == "softmax" else torch.sigmoid(logits)
    keys = scores if signature.ranks_by_score else logits
    if bias is not None:
        keys = keys + bias
    if signature.groups > 1:
        keys = _in_best_groups(signature, keys, topk)
    ids = topk(keys, signature.top_k)
    weights = scores.gather(1, ids)
    if signature.renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return ids, weights * signature.scale


def _in_best_groups(signature: GatingSignature, keys: Tensor, topk: _TopK) -> Tensor:
    """``keys`` with -inf for experts outside the best groups."""
    grouped = keys.view(-1, signature.groups, signature.group_size)
    counted = 2 if signature.score == "sigmoid" else 1
    best = topk(grouped.topk(counted, dim=2).values.sum(dim=2), signature.top_groups)
    ruled_out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=keys.device).scatter_(1, best, value=False)
    return grouped.masked_fill(ruled_out[..., None], -torch.inf).view_as(keys)


def _order(
    signature: GatingSignature,
    ids: Tensor,
    expert_offsets: Tensor,
    row_token: Tensor,
    slot_row: Tensor,
    sorted_slots: Tensor | None = None,
    block_experts: Tensor | None = None,
    padded_rows: Tensor | None = None,
) -> None:
    """Sort choices by expert; callers may pass outputs that are not contiguous."""
    made = [torch.empty(like.shape, dtype=torch.int32, device="cpu") for like in (row_token, expert_offsets, slot_row)]
    sort_tokens_into(ids, signature.experts, made[0].view(-1), *made[1:])
    for output, value in zip((row_token, expert_offsets, slot_row), made, strict=True):
        output.copy_(value)
    if sorted_slots is None or block_experts is None or padded_rows is None:
        return
    order = TokenOrder(*(tensor.numpy() for tensor in made))
    room = min(sorted_slots.numel() // signature.block_size, block_experts.numel()) * signature.block_size
    blocks = pad_blocks(order, signature.block_size, room)
    sorted_slots.fill_(ids.numel())
    sorted_slots[:room].copy_(torch.from_numpy(blocks.sorted_slots))
    block_experts.zero_()
    block_experts[: room // signature.block_size].copy_(torch.from_numpy(blocks.block_experts))
    padded_rows.fill_(blocks.padded_rows)


def _order_on_device(
    signature: GatingSignature,
    ids: Tensor,
    expert_offsets: Tensor,
    row_token: Tensor,
    slot_row: Tensor,
    sorted_slots: Tensor | None = None,
    block_experts: Tensor | None = None,
    padded_rows: Tensor | None = None,
) -> None:
    """The same on a GPU; room for all that choices could take is asked for, since what they take is not known.

    Raises:
        TilewrightError: where there is less.

    """
    outputs = (row_token, expert_offsets, slot_row)
    rows, offsets, slots = (torch.empty(like.shape, dtype=torch.int32, device=ids.device) for like in outputs)
    sort_tokens_on_device(ids, signature.experts, rows.view(-1), offsets, slots)
    for output, value in zip(outputs, (rows, offsets, slots), strict=True):
        output.copy_(value)
    if sorted_slots is not None and block_experts is not None and padded_rows is not None:
        room = min(sorted_slots.numel() // signature.block_size, block_experts.numel()) * signature.block_size
        if room < signature.padded_rows(ids.shape[0]):
            raise TilewrightError(
                f"gating: {signature.padded_rows(ids.shape[0])} padded rows may exceed the {room} that there is room "
                "for; give sorted_slots and block_experts that many"
            )
        pad_blocks_on_device(ids, offsets, slots, signature.block_size, sorted_slots, block_experts, padded_rows)


def checked_bias(bias: Tensor, experts: int) -> Tensor:
    """``bias`` as a contiguous fp32 tensor [experts], where it lies.

    Raises:
        TilewrightError: when it is anything else.

    """
    if not isinstance(bias, Tensor) or bias.device.type not in ("cpu", "cuda") or bias.dtype is not torch.float32:
        raise TilewrightError(f"gating: bias must be a torch.float32 tensor [{experts}] on the CPU or a GPU")
    require_plain(bias, "gating: bias")
    if tuple(bias.shape) != (experts,):
        raise TilewrightError(f"gating: bias has shape {list(bias.shape)}; expected [{experts}]")
    if not bool(torch.isfinite(bias).all()):
        raise TilewrightError("gating: bias holds NaN or an infinity; every expert needs a finite bias")
    return resolved(bias.detach()).contiguous()
