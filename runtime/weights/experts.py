"""Expert weights: checked as callers pass them, and read expert by expert, packed or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.errors import TilewrightError
from tilewright.runtime.torch.readable import require_plain, resolved
from tilewright.runtime.weights.dequantising import dequantise


class ExpertWeights(Protocol):
    """Weights of one stage, one expert at a time."""

    def expert(self, index: int) -> Tensor:
        """Weight of expert ``index`` as the op declares it, [n, k]."""
        ...


@dataclass(frozen=True)
class DeclaredWeights:
    """Weights [experts, n, k] as the op declares them."""

    weight: Tensor

    def expert(self, index: int) -> Tensor:
        """Weight of one expert, [n, k]."""
        return self.weight[index]


@dataclass(frozen=True)
class PackedWeights:
    """Weights in a kernel's layout, [experts, panels, rows of words, columns]."""

    packed: Tensor
    layout: WeightLayout
    rows: int
    """n of the declared weight, both halves counted."""
    k: int

    def expert(self, index: int) -> Tensor:
        """Weight of one expert as declared, [n, k], as kernels read it: a copy, made without unpacking the others."""
        layout = self.layout
        panel = self.packed[index]
        depth = panel.shape[1]
        run = layout.run or layout.columns
        # Columns, over all panels, are runs that alternate between the halves; a half's lie in the order of its runs.
        in_turn = panel.transpose(1, 2).reshape(-1, layout.halves, run, depth)
        halves = in_turn.transpose(0, 1).reshape(layout.halves, -1, depth)
        declared = halves[:, : self.rows // layout.halves].reshape(self.rows, depth)
        return dequantise(declared, layout.stored, self.k) if layout.stored.quantised else declared


def checked_weight(weight: Any, *, what: str, dims: str) -> Tensor:
    """``weight``, a tensor or DLPack object, as a CPU fp32 tensor of as many dimensions as ``dims`` names.

    Raises:
        TilewrightError: when it is anything else.

    """
    tensor = _as_tensor(weight, what)
    expected = f"expected a torch.float32 CPU tensor [{dims}]"
    if tensor.device.type != "cpu":
        raise TilewrightError(f"{what} is on device {tensor.device}; {expected}")
    if tensor.dtype is not torch.float32:
        raise TilewrightError(f"{what} has dtype {tensor.dtype}; {expected}")
    if tensor.dim() != dims.count(",") + 1:
        raise TilewrightError(f"{what} has shape {list(tensor.shape)}; {expected}")
    if tensor.numel() == 0:
        raise TilewrightError(
            f"{what} is empty, its shape being {list(tensor.shape)}; every dimension must be positive"
        )
    return resolved(tensor)


def checked_bias(bias: Any, *, what: str, experts: int, rows: int) -> Tensor:
    """``bias`` as a contiguous CPU fp32 tensor [experts, rows].

    Raises:
        TilewrightError: when it is anything else.

    """
    tensor = checked_weight(bias, what=what, dims="experts, n")
    if tuple(tensor.shape) != (experts, rows):
        raise TilewrightError(
            f"{what} has shape {list(tensor.shape)}; its weight has {experts} experts of {rows} rows, "
            f"so expected [{experts}, {rows}]"
        )
    return tensor.contiguous()


def _as_tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, Tensor):
        require_plain(value, what)
        # What is served here has no backward pass, and shares the owner's memory.
        return value.detach()
    try:
        return from_dlpack(value)
    except (AttributeError, TypeError, BufferError, RuntimeError) as error:
        raise TilewrightError(
            f"{what} is a {type(value).__name__}; expected a torch tensor or a DLPack object"
        ) from error
