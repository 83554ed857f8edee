"""moe_gemm as the runtime serves it: the weight packed once, and plain torch where no tuned kernel serves.

The torch functions write their whole output. They read weights expert by expert, so that they work on the original
weight as well as on a packed one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.runtime.ops.base import BoundWeights, ServedOp, WeightCopy
from tilewright.runtime.serve.kernels import AnyLayout
from tilewright.runtime.serve.plans import Resolution
from tilewright.runtime.torch.activations import activate
from tilewright.runtime.torch.experts_on_device import experts_fallback
from tilewright.runtime.torch.plain import plain_torch
from tilewright.runtime.weights.experts import DeclaredWeights, ExpertWeights
from tilewright.runtime.weights.laying_out import laid_out_weights, lay_out


class ServedMoeGemm(ServedOp[MoeGemmSignature]):
    """Packs ``weight`` [experts, n, k] in the plan's layout, or in each of them."""

    name: ClassVar[str] = "moe_gemm"

    def bind(
        self, signature: MoeGemmSignature, weights: Mapping[str, Tensor], resolution: Resolution, *, keep_weights: bool
    ) -> BoundWeights:
        """See :class:`ServedOp`. Without a kernel the weight stays as it is, and may be strided."""
        weight, bias = weights["weight"], weights.get("bias")
        weight_shape = weight.shape  # by itself, so that nothing here keeps the weight alive
        copies, readable = _lay_out(weight, resolution, keep_weights)
        served: Tensor | int = copies[0].tensor if copies else 0
        fallback = fallback_for if resolution.device.is_host else experts_fallback
        return BoundWeights(
            {"weight": served, **({} if bias is None else {"bias": bias})},
            fallback(signature, readable, bias),
            lambda: {"weight": _read_all(readable, weight_shape), **({} if bias is None else {"bias": bias})},
            copies=copies[1:],
            copied_bytes=sum(each.tensor.nbytes for each in copies if each.tensor.data_ptr() != weight.data_ptr()),
            weight_bytes=weight.nbytes,
        )


def _lay_out(weight: Tensor, resolution: Resolution, keep_weight: bool) -> tuple[tuple[WeightCopy, ...], ExpertWeights]:
    """The weight as the plan's kernels take it, in each of their layouts, and as the fallback reads it."""
    copies: list[WeightCopy] = []
    packed: dict[AnyLayout, Tensor] = {}
    declared = weight if keep_weight or not resolution.kernels else None
    for layout in resolution.layouts:
        if layout is None:
            declared = weight.contiguous()
            copies.append(WeightCopy("weight", None, declared))
        else:
            packed[layout] = lay_out(weight, layout)
            copies.append(WeightCopy("weight", layout, packed[layout]))
    if declared is not None:
        return tuple(copies), DeclaredWeights(declared)
    # Of several, the copy that says most of what the weight was.
    finest = max(packed, key=lambda layout: layout.stored.bits)
    experts, n, k = weight.shape
    return tuple(copies), laid_out_weights(packed[finest], finest, (experts, n, k))


def _read_all(weights: ExpertWeights, shape: torch.Size) -> Tensor:
    """Weights [experts, n, k] as declared."""
    if isinstance(weights, DeclaredWeights):
        return weights.weight
    first = weights.expert(0)
    out = torch.empty(shape, dtype=first.dtype, device=first.device)
    for index in range(shape[0]):
        out[index] = weights.expert(index)
    return out


def fallback_for(signature: MoeGemmSignature, weights: ExpertWeights, bias: Tensor | None) -> Callable[..., None]:
    """Torch implementation of ``signature``, called with the tensors of a call without weight and bias, in order."""
    match signature.stage:
        case "up":

            def up(x: Tensor, row_token: Tensor, expert_offsets: Tensor, out: Tensor) -> None:
                with plain_torch():
                    for expert, rows in _active(expert_offsets):
                        _linear(x[row_token[rows]], weights, bias, expert, signature.activation, out[rows])

            return up
        case "plain":

            def plain(x: Tensor, expert_offsets: Tensor, out: Tensor) -> None:
                with plain_torch():
                    for expert, rows in _active(expert_offsets):
                        _linear(x[rows], weights, bias, expert, signature.activation, out[rows])

            return plain
        case "down":

            def down(x: Tensor, expert_offsets: Tensor, slot_row: Tensor, topk_weights: Tensor, out: Tensor) -> None:
                with plain_torch():
                    partial = out.new_empty((x.shape[0], signature.n))
                    for expert, rows in _active(expert_offsets):
                        _linear(x[rows], weights, bias, expert, signature.activation, partial[rows])
                    _combine(partial, slot_row, topk_weights, out)

            return down


def _active(expert_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, with their rows of the sorted order."""
    offsets: Sequence[int] = expert_offsets.tolist()
    for expert, (first, end) in enumerate(itertools.pairwise(offsets)):
        if end > first:
            yield expert, slice(first, end)


def _linear(x: Tensor, weights: ExpertWeights, bias: Tensor | None, expert: int, activation: str, out: Tensor) -> None:
    """``out`` = activation(x @ weight^T + bias) of one expert."""
    y = functional.linear(x, weights.expert(expert), None if bias is None else bias[expert])
    out.copy_(activate(y, activation))


def _combine(partial: Tensor, slot_row: Tensor, topk_weights: Tensor, out: Tensor) -> None:
    """Sum a token's partial results [rows, n], each times its routing weight; slots of -1 add nothing."""
    out.zero_()
    if partial.shape[0] == 0:
        return
    for rows, weights in zip(slot_row.unbind(1), topk_weights.unbind(1), strict=True):
        here = rows >= 0
        # Selected, not multiplied by 0: row 0 stands in for an absent slot, and may hold an infinity.
        out += torch.where(here[:, None], weights[:, None] * partial[rows.clamp(min=0)], 0.0)
