"""moe_gemm in plain torch on a GPU: no value is waited for where torch multiplies all experts at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.runtime.torch.activations import activate
from tilewright.runtime.torch.plain import plain_torch
from tilewright.runtime.weights.experts import DeclaredWeights, ExpertWeights

_ALIGNED_BYTES = 16
"""Of rows and addresses that torch's grouped product takes."""
_refused: set[tuple[torch.device, torch.dtype]] = set()
"""Where torch has said that it has no grouped product: older ones have none for some devices and dtypes."""


def experts_fallback(signature: MoeGemmSignature, weights: ExpertWeights, bias: Tensor | None) -> Callable[..., None]:
    """Torch implementation of ``signature``, called with the tensors of a call without weight and bias, in order.

    Rows behind those of the last expert get anything: what is asked of them is not known without waiting.
    """

    def linear(x: Tensor, expert_offsets: Tensor) -> Tensor:
        """activation(x @ weight^T + bias), fp32: bf16 has few bits for what activations do."""
        product = _grouped_product(x, weights, expert_offsets).float()
        if bias is not None:
            product += bias[_expert_of_row(expert_offsets, x.shape[0])]
        return activate(product, signature.activation)

    def up(x: Tensor, row_token: Tensor, expert_offsets: Tensor, out: Tensor) -> None:
        with plain_torch():
            out.copy_(linear(x[row_token], expert_offsets))

    def plain(x: Tensor, expert_offsets: Tensor, out: Tensor) -> None:
        with plain_torch():
            out.copy_(linear(x, expert_offsets))

    def down(x: Tensor, expert_offsets: Tensor, slot_row: Tensor, topk_weights: Tensor, out: Tensor) -> None:
        with plain_torch():
            if not x.shape[0]:
                out.zero_()
                return
            rows = linear(x, expert_offsets)
            total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
            for slot, weight in zip(slot_row.unbind(1), topk_weights.unbind(1), strict=True):
                # Selected, not multiplied by 0: row 0 stands in for an absent slot, and may hold an infinity.
                added = weight[:, None] * rows[slot.clamp(min=0)]
                total += torch.where((slot >= 0)[:, None], added, 0.0)
            out.copy_(total)

    computed: dict[str, Callable[..., None]] = {"up": up, "plain": plain, "down": down}
    return computed[signature.stage]


def _expert_of_row(expert_offsets: Tensor, rows: int) -> Tensor:
    """int64 [rows]; the last expert for those behind its rows."""
    at = torch.arange(rows, dtype=expert_offsets.dtype, device=expert_offsets.device)
    return torch.searchsorted(expert_offsets[1:-1].contiguous(), at, right=True)


def _grouped_product(x: Tensor, weights: ExpertWeights, expert_offsets: Tensor) -> Tensor:
    """[rows, n] of ``x`` [rows, k], each row times the weight of its expert."""
    declared = weights.weight if isinstance(weights, DeclaredWeights) else None
    kind = (x.device, x.dtype)
    if declared is not None and kind not in _refused and _is_aligned(x) and _is_aligned(declared):
        try:
            return _torch_grouped(x, declared.transpose(1, 2), expert_offsets[1:])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # NotImplementedError is one
            _refused.add(kind)
    return _expert_by_expert(x, weights, expert_offsets)


def _torch_grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Torch's own; public since 2.10."""
    public: Any = getattr(functional, "grouped_mm", None)
    product: Any = public or getattr(torch, "_grouped_mm", None)
    if product is None:
        raise NotImplementedError
    result: Tensor = product(x, weight, offs=ends)
    return result


def _is_aligned(tensor: Tensor) -> bool:
    steps = _ALIGNED_BYTES // tensor.element_size()
    *outer, last = tensor.stride()
    in_steps = all(not stride % steps for stride, count in zip(outer, tensor.shape, strict=False) if count > 1)
    return last == 1 and in_steps and not tensor.data_ptr() % _ALIGNED_BYTES


def _expert_by_expert(x: Tensor, weights: ExpertWeights, expert_offsets: Tensor) -> Tensor:
    """One product for each expert that has rows; which those are has to be waited for."""
    product: Tensor | None = None
    offsets: Sequence[int] = expert_offsets.tolist()
    for expert, (first, end) in enumerate(itertools.pairwise(offsets)):
        if end > first:
            rows = functional.linear(x[first:end], weights.expert(expert))
            if product is None:
                product = x.new_zeros((x.shape[0], rows.shape[1]))
            product[first:end] = rows
    return x.new_zeros((x.shape[0], weights.expert(0).shape[0])) if product is None else product
