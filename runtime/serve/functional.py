"""Stages as plain functions: the weight is packed at its first use, and stays packed for as long as it lives.

Each call looks the packed weight up again, which costs some microseconds; :func:`tilewright.runtime.prepare` does not.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tilewright.codegen.ops.moe_gemm.signature import Activation, Stage
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import TORCH_DTYPES
from tilewright.runtime.locks import fork_safe_lock
from tilewright.runtime.serve.gemm import PreparedGemm, prepare
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.torch.readable import require_plain


@dataclass(frozen=True)
class _Packed:
    stamp: Hashable
    """What the weight and bias were when they were packed; another stamp means that they changed since."""
    prepared: PreparedGemm


_packed_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_packing = fork_safe_lock()


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    options: ServeOptions = ServeOptions(),
) -> Tensor:
    """``out[r] = x[r] @ weight[e].T + bias[e]``, e being the expert whose range in ``expert_offsets`` holds row r.

    Args:
        x: [rows, k], of the weight's dtype.
        weight: fp32, on a GPU also bf16 or fp16 [experts, n, k]; packed once, again after it was changed in place.
        expert_offsets: int32 [experts + 1], rising from 0 to ``rows``.
        bias: fp32, or of the weight's dtype [experts, n], or None.
        out: [rows, n] to write; made when None.
        options: which plans may serve, and how.

    Raises:
        TilewrightError: for tensors that do not fit together.

    """
    prepared = _prepared(weight, bias, "plain", 1, "none", options)
    result: Tensor = prepared.call(x, expert_offsets, _output(prepared, out, x, "x"))
    return result


def moe_up(
    x: Tensor,
    weight: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    *,
    top_k: int,
    activation: Activation = "swiglu",
    bias: Tensor | None = None,
    out: Tensor | None = None,
    options: ServeOptions = ServeOptions(),
) -> Tensor:
    """``out[r] = activation(x[row_token[r]] @ weight[e].T + bias[e])``: the first half of an expert FFN.

    Args:
        x: [tokens, k], of the weight's dtype.
        weight: fp32, on a GPU also bf16 or fp16 [experts, 2n, k], gate rows before up rows; [experts, n, k] without
            activation.
        row_token: int32 [rows], the token of each row, from :func:`tilewright.runtime.sort_tokens`.
        expert_offsets: int32 [experts + 1], rising from 0 to ``rows``.
        top_k: experts per token.
        activation: ``swiglu``, ``geglu``, ``swiglu_clamped`` (gpt-oss) or ``none``.
        bias: fp32, or of the weight's dtype [experts, rows of the weight], or None.
        out: [rows, n] to write; made when None.
        options: which plans may serve, and how.

    Raises:
        TilewrightError: for tensors that do not fit together.

    """
    prepared = _prepared(weight, bias, "up", top_k, activation, options)
    result: Tensor = prepared.call(x, row_token, expert_offsets, _output(prepared, out, row_token, "row_token"))
    return result


def moe_down(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    slot_row: Tensor,
    topk_weights: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    options: ServeOptions = ServeOptions(),
) -> Tensor:
    """``out[t] = sum_j topk_weights[t, j] * (x[slot_row[t, j]] @ weight[e].T + bias[e])``: the second half.

    Args:
        x: [rows, k], of the weight's dtype, in the order that :func:`moe_up` writes.
        weight: fp32, on a GPU also bf16 or fp16 [experts, n, k].
        expert_offsets: int32 [experts + 1], rising from 0 to ``rows``.
        slot_row: int32 [tokens, top_k], the row of each choice, or -1 where another rank computes it.
        topk_weights: fp32 [tokens, top_k].
        bias: fp32, or of the weight's dtype [experts, n], or None.
        out: [tokens, n] to write; made when None.
        options: which plans may serve, and how.

    Raises:
        TilewrightError: for tensors that do not fit together.

    """
    _length(slot_row, "slot_row")
    prepared = _prepared(weight, bias, "down", slot_row.shape[-1], "none", options)
    result: Tensor = prepared.call(
        x, expert_offsets, slot_row, topk_weights, _output(prepared, out, slot_row, "slot_row")
    )
    return result


def _prepared(
    weight: Tensor,
    bias: Tensor | None,
    stage: Stage,
    top_k: int,
    activation: Activation,
    options: ServeOptions,
) -> PreparedGemm:
    """The stage prepared for ``weight``, made now or remembered."""
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
        kind = type(weight if not isinstance(weight, Tensor) else bias).__name__
        raise TilewrightError(
            f"moe_gemm {stage}: weight and bias must be torch tensors, for their packed copy lives as long as they do; "
            f"got a {kind}. Use prepare() for other arrays"
        )
    require_plain(weight, f"moe_gemm {stage}: weight")
    if bias is not None:
        require_plain(bias, f"moe_gemm {stage}: bias")
    key = (stage, top_k, activation, bias is not None, options, options.thread_count)
    stamp = (_stamp(weight), None if bias is None else _stamp(bias))
    known: dict[Hashable, _Packed] | None = _packed_of.get(weight)  # type: ignore[no-untyped-call]
    if known is not None and key in known and known[key].stamp == stamp:
        return known[key].prepared
    with _packing:
        known = _packed_of.setdefault(weight, {})  # type: ignore[no-untyped-call]
        if key not in known or known[key].stamp != stamp:
            prepared = prepare(weight, stage=stage, top_k=top_k, activation=activation, bias=bias, options=options)
            known[key] = _Packed(stamp, prepared)
        return known[key].prepared


def _stamp(tensor: Tensor) -> Hashable:
    """Changes when ``tensor`` is written in place or gets other memory; inference tensors do not tell of writes."""
    return (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)  # noqa: SLF001 - torch documents it


def _output(prepared: PreparedGemm, out: Tensor | None, like: Tensor, name: str) -> Tensor:
    """``out``, or a new output with a row per row of ``like``."""
    if out is not None:
        return out
    shape, dtype = (_length(like, name), prepared.signature.n), TORCH_DTYPES[prepared.signature.out_dtype]
    return torch.empty(shape, dtype=dtype, device=prepared.device.torch_device)


def _length(tensor: Tensor, name: str) -> int:
    if isinstance(tensor, Tensor):
        require_plain(tensor, f"moe_gemm: {name}")
    if not isinstance(tensor, Tensor) or tensor.dim() == 0:
        found = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
        raise TilewrightError(f"moe_gemm: {name} must be a torch tensor of at least one dimension; it has {found}")
    return tensor.shape[0]
