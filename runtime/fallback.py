"""Plain torch implementations of the op: what serves where no tuned kernel does. Correct, in place, never fast.

Every function writes its whole output. It reads weights expert by expert, so that it works on the original weight as
well as on a packed one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.codegen.ops.moe_gemm_signature import MoeGemmSignature
from tilewright.errors import TilewrightError
from tilewright.runtime.openmp import forked
from tilewright.runtime.weights import ExpertWeights


def fallback_for(signature: MoeGemmSignature, weights: ExpertWeights, bias: Tensor | None) -> Callable[..., None]:
    """Torch implementation of ``signature``, called with the tensors of a call without weight and bias, in order."""
    match signature.stage:
        case "up":

            def up(x: Tensor, row_token: Tensor, expert_offsets: Tensor, out: Tensor) -> None:
                with _plain_torch():
                    for expert, rows in _active(expert_offsets):
                        _linear(x[row_token[rows]], weights, bias, expert, signature.activation, out[rows])

            return up
        case "plain":

            def plain(x: Tensor, expert_offsets: Tensor, out: Tensor) -> None:
                with _plain_torch():
                    for expert, rows in _active(expert_offsets):
                        _linear(x[rows], weights, bias, expert, signature.activation, out[rows])

            return plain
        case "down":

            def down(x: Tensor, expert_offsets: Tensor, slot_row: Tensor, topk_weights: Tensor, out: Tensor) -> None:
                with _plain_torch():
                    partial = out.new_empty((x.shape[0], signature.n))
                    for expert, rows in _active(expert_offsets):
                        _linear(x[rows], weights, bias, expert, signature.activation, partial[rows])
                    _combine(partial, slot_row, topk_weights, out)

            return down


def spare_torch_threads() -> None:
    """In a forked child, keep torch on the calling thread: its pool did not survive the fork."""
    if forked() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Torch that completes in a forked child, records nothing for autograd, and writes to outputs of either mode."""
    spare_torch_threads()
    with torch.inference_mode():
        yield


def _active(expert_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, with their rows of the sorted order."""
    offsets: Sequence[int] = expert_offsets.tolist()
    for expert, (first, end) in enumerate(itertools.pairwise(offsets)):
        if end > first:
            yield expert, slice(first, end)


def _linear(x: Tensor, weights: ExpertWeights, bias: Tensor | None, expert: int, activation: str, out: Tensor) -> None:
    """``out`` = activation(x @ weight^T + bias) of one expert."""
    y = functional.linear(x, weights.expert(expert), None if bias is None else bias[expert])
    out.copy_(_activate(y, activation))


def _activate(y: Tensor, activation: str) -> Tensor:
    """``y`` [rows, n], or the gated half of it when ``activation`` takes a gate and an up half."""
    match activation:
        case "none":
            return y
        case "swiglu":
            gate, up = y.chunk(2, dim=-1)
            return functional.silu(gate) * up
        case "geglu":
            gate, up = y.chunk(2, dim=-1)
            return functional.gelu(gate, approximate="tanh") * up
        case _:
            raise TilewrightError(f"unknown activation {activation!r}; known: none, swiglu, geglu")


def _combine(partial: Tensor, slot_row: Tensor, topk_weights: Tensor, out: Tensor) -> None:
    """Sum a token's partial results [rows, n], each times its routing weight; slots of -1 add nothing."""
    out.zero_()
    if partial.shape[0] == 0:
        return
    for rows, weights in zip(slot_row.unbind(1), topk_weights.unbind(1), strict=True):
        here = rows >= 0
        # Selected, not multiplied by 0: row 0 stands in for an absent slot, and may hold an infinity.
        out += torch.where(here[:, None], weights[:, None] * partial[rows.clamp(min=0)], 0.0)
