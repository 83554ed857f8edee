"""Choosing experts and sorting tokens by expert in plain torch, on the device where the tensors lie.

Nothing is waited for: no shape depends on a value, and ids that are out of range are taken for experts of other ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.errors import TilewrightError


def sort_tokens_on_device(
    topk_ids: Tensor, experts: int, row_token: Tensor, expert_offsets: Tensor, slot_row: Tensor
) -> int:
    """Sort picks by expert into contiguous int32 buffers, as :func:`tilewright.runtime.sort_tokens` defines it.

    Args:
        topk_ids: int32 or int64 [tokens, top_k]; a pick outside [0, ``experts``) gets no row.
        experts: experts on this rank.
        row_token: [tokens * top_k] to write, or more of which the rest keeps what it held. Behind the rows in use
            tokens follow that no row computes.
        expert_offsets: [experts + 1] to write; the last one counts the rows in use.
        slot_row: [tokens, top_k] to write.

    Returns:
        tokens * top_k: how many rows are in use is not known without waiting.

    """
    top_k = topk_ids.shape[1]
    flat = topk_ids.reshape(-1)
    is_here = (flat >= 0) & (flat < experts)
    in_order, slots = torch.where(is_here, flat, experts).sort(stable=True)
    rows = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    row_token[: flat.numel()] = slots // top_k
    first_experts = torch.arange(experts + 1, dtype=in_order.dtype, device=flat.device)
    expert_offsets.copy_(torch.searchsorted(in_order, first_experts))
    slot_row.view(-1)[slots] = torch.where(in_order < experts, rows, -1)
    return flat.numel()


def softmax_topk_on_device(logits: Tensor, renormalize: bool, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """The most probable experts into buffers [tokens, top_k], as :func:`tilewright.runtime.softmax_topk` defines it.

    Logits that are not numbers give weights that are none.
    """
    ids = stable_topk_on_device(logits, topk_ids.shape[1])
    topk_ids.copy_(ids)
    if renormalize:
        topk_weights.copy_(torch.softmax(logits.gather(1, ids), dim=1))
    else:
        topk_weights.copy_(torch.softmax(logits, dim=1).gather(1, ids))


def stable_topk_on_device(keys: Tensor, top_k: int) -> Tensor:
    """Ids int64 [tokens, top_k] of the largest ``keys`` [tokens, experts], equal ones by rising id."""
    return keys.sort(dim=1, descending=True, stable=True).indices[:, :top_k]


def pad_blocks_on_device(
    ids: Tensor,
    expert_offsets: Tensor,
    slot_row: Tensor,
    block_size: int,
    sorted_slots: Tensor,
    block_experts: Tensor,
    padded_rows: Tensor,
) -> None:
    """Pad the rows of every expert to whole blocks, as ``codegen.routing.spec.pad_blocks`` defines it.

    Args:
        ids: int [tokens, top_k], all of them of experts on this rank.
        expert_offsets: int32 [experts + 1] of these.
        slot_row: int32 [tokens, top_k] of these.
        block_size: rows of a block.
        sorted_slots: int32 [padded] to write, with room for all blocks.
        block_experts: int32 [blocks] to write.
        padded_rows: int32 [1] to write.

    """
    offsets = expert_offsets.long()
    blocks = (offsets.diff() + (block_size - 1)) // block_size
    ends = blocks.cumsum(0)
    shift = (ends - blocks) * block_size - offsets[:-1]
    flat = ids.reshape(-1).long()
    sorted_slots.fill_(flat.numel())
    places = slot_row.reshape(-1).long() + shift[flat]
    sorted_slots[places] = torch.arange(flat.numel(), dtype=sorted_slots.dtype, device=ids.device)
    at = torch.arange(block_experts.numel(), dtype=torch.int64, device=ids.device)
    owners = torch.searchsorted(ends, at, right=True)
    block_experts.copy_(torch.where(at < ends[-1], owners, 0))
    padded_rows.copy_(ends[-1:] * block_size)


def require_ids(topk_ids: Tensor, experts: int) -> None:
    """Refuse ids out of range, which has to wait for the device.

    Raises:
        TilewrightError: names the first.

    """
    outside = (topk_ids < -1) | (topk_ids >= experts)
    if bool(outside.any()):
        token, slot = (int(at) for at in outside.nonzero()[0])
        raise TilewrightError(
            f"token {token} picks expert {int(topk_ids[token, slot])} in slot {slot}, but ids go from 0 to "
            f"{experts - 1} (-1 for an expert of another rank)"
        )


def require_logits(logits: Tensor) -> None:
    """Refuse logits without a softmax, which has to wait for the device.

    Raises:
        TilewrightError: names the first token.

    """
    largest = logits.amax(dim=1)
    wrong = ~torch.isfinite(largest)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        raise TilewrightError(
            f"token {token} has a largest router logit of {float(largest[token])}, so that there is no softmax; "
            "logits must be numbers, or -inf for experts that are ruled out"
        )
