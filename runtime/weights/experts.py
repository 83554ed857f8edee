"""Expert weights: checked as callers pass them, and read expert by expert, packed or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.errors import TilewrightError
from tilewright.runtime.torch.readable import require_plain, resolved
from tilewright.runtime.weights.dequantising import dequantise
from tilewright.runtime.weights.rows_on_device import unpack_rows

_SERVED_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16, torch.float32)}
"""Of weights, by the kind of device that they lie on."""


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


@dataclass(frozen=True)
class RowWeights:
    """Weights as GPU kernels read them: rows of elements and their scales, in the dtype of the declared weight."""

    packed: Tensor
    layout: RowLayout
    shape: tuple[int, int, int]
    """[experts, n, k] as declared."""

    def expert(self, index: int) -> Tensor:
        """Weight of one expert as declared, [n, k]: a copy, made without unpacking the others."""
        return unpack_rows(self.packed, self.layout, self.shape, index).to(self.packed.dtype)


def checked_weight(weight: Any, *, what: str, dims: str) -> Tensor:
    """``weight``, a tensor or DLPack object, as a tensor of as many dimensions as ``dims`` names.

    On the CPU it has to be fp32, on a GPU bf16, fp16 or fp32.

    Raises:
        TilewrightError: when it is anything else.

    """
    tensor = _as_tensor(weight, what)
    dtypes = _SERVED_DTYPES.get(tensor.device.type)
    if dtypes is None:
        raise TilewrightError(
            f"{what} is on device {tensor.device}; expected a torch.float32 CPU tensor [{dims}], or one on a GPU"
        )
    expected = f"expected {' or '.join(map(str, dtypes))} on {tensor.device}, [{dims}]"
    if tensor.dtype not in dtypes:
        raise TilewrightError(f"{what} has dtype {tensor.dtype}; {expected}")
    if tensor.dim() != dims.count(",") + 1:
        raise TilewrightError(f"{what} has shape {list(tensor.shape)}; {expected}")
    if tensor.numel() == 0:
        raise TilewrightError(
            f"{what} is empty, its shape being {list(tensor.shape)}; every dimension must be positive"
        )
    return resolved(tensor)


def checked_bias(bias: Any, *, what: str, weight: Tensor) -> Tensor:
    """``bias`` of ``weight`` [experts, n, k] as a contiguous fp32 tensor [experts, n] beside it.

    Raises:
        TilewrightError: when it is anything else.

    """
    tensor = checked_weight(bias, what=what, dims="experts, n")
    experts, rows = weight.shape[:2]
    if tuple(tensor.shape) != (experts, rows):
        raise TilewrightError(
            f"{what} has shape {list(tensor.shape)}; its weight has {experts} experts of {rows} rows, "
            f"so expected [{experts}, {rows}]"
        )
    if tensor.device != weight.device:
        raise TilewrightError(f"{what} is on {tensor.device}, and its weight on {weight.device}; put it there, too")
    return tensor.float().contiguous()


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
